"""Instruction data as conversations: alpaca, messages, ShareGPT and prompt/completion rows, each drop counted.

    alpaca              {instruction, output}, optional input, system
    messages            {messages: [{role, content}, ...]}                          OpenAI's form
    ShareGPT            {conversations: [{from, value}, ...]}, optional system
    prompt/completion   {prompt, completion}

A row belongs to a part by the hash of what comes before its last answer (`text.split_of`), so that one question is
never both learnt and asked. A row that cannot teach an answer is left out and counted by its reason; a broken file is
an error.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from research.data import rows
from research.data.assets import fetch
from research.data.text import split_of
from research.errors import DataError, did_you_mean

PACKAGED = {  # name: ((language, file of the llamafactory sdist), ...)
    "alpaca/en": (("en", "alpaca_en_demo.json"),),
    "alpaca/zh": (("zh", "alpaca_zh_demo.json"),),
    "alpaca": (("en", "alpaca_en_demo.json"), ("zh", "alpaca_zh_demo.json")),
}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
FORMS = "instruction and output, messages, conversations, or prompt and completion"

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class Dropped(Exception):
    """Why a row is left out; its text is the reason that is counted."""


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer, their language ("" if unknown), and `where` they stand ("file:line")."""

    messages: tuple[Message, ...]
    language: str
    where: str

    @property
    def part(self) -> str:
        """ "train", "validation" or "test"."""
        return split_of("\n".join(message["content"] for message in self.messages[:-1]))


@dataclass(frozen=True)
class Conversations:
    """What a source holds, in its order, and how many rows were left out for which reason."""

    name: str
    kept: tuple[Conversation, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def part(self, name: str, language: str | None = None) -> tuple[Conversation, ...]:
        """Returns the conversations of a part, of one language if given. Raises DataError if there are none."""
        found = tuple(c for c in self.kept if c.part == name and language in (None, c.language))
        if not found:
            kind = f" in language {language!r}" if language else ""
            raise DataError(f"{self.name}: the {name} part is empty{kind}; {len(self.kept)} rows are too few to split")
        return found

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(sorted({conversation.language for conversation in self.kept}))

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each reason a row was dropped, most frequent first."""
        counts = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        return tuple(f"{self.name}: {count} rows dropped: {reason}" for reason, count in counts)


def load(source: str, *, cache: str | os.PathLike | None = None) -> Conversations:
    """Returns the conversations of a packaged set ("alpaca", "alpaca/en", "alpaca/zh"), a .json or .jsonl file, or the
    train part of a `datasets` id ("owner/name", "owner/name:config").

    Raises DataError: an unknown source, broken JSON or a row of unknown form (`file:line: ...`), no row with an answer.
    """
    if source in PACKAGED:
        home = fetch("llamafactory", cache)
        records = (
            (where, record, language)
            for language, file in PACKAGED[source]
            for where, record in read_records(home / file)
        )
    else:
        path = Path(source).expanduser()
        local = path.suffix in (".json", ".jsonl") or path.exists()
        records = ((where, record, "") for where, record in (read_records(path) if local else _hub(source)))
    return collect(source, records)


def collect(name: str, records: Iterable[tuple[str, object, str]]) -> Conversations:
    """Returns the conversations of (where, record, language), without those that teach no answer or repeat another."""
    kept, seen, dropped = [], set(), Counter()
    for where, record, language in records:
        try:
            messages = conversation(record, where)
            key = tuple((message["role"], message["content"]) for message in messages)
            if key in seen:
                raise Dropped("repeats another row")
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        seen.add(key)
        own = record.get("language", "")
        kept.append(Conversation(messages, language or (own if isinstance(own, str) else ""), where))
    if not kept:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
        raise DataError(f"{name}: no row to learn from: {reasons or 'it has no rows'}")
    return Conversations(name, tuple(kept), dict(dropped))


def conversation(record: object, where: str) -> tuple[Message, ...]:
    """Returns the messages of a row of any of the four forms.

    Raises Dropped for a row that teaches no answer, DataError for one of unknown form.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object with {FORMS}, found {type(record).__name__}")
    turns = []
    if isinstance(record.get("system"), str) and record["system"].strip():
        turns.append(("system", record["system"]))
    if "messages" in record or "conversations" in record:
        turns += _turns(record["messages"] if "messages" in record else record["conversations"])
    elif "instruction" in record and "output" in record:
        asked = [record["instruction"], record.get("input") or ""]
        if not all(isinstance(text, str) for text in asked):
            raise Dropped("a text is no string")
        turns += [("user", "\n".join(text for text in asked if text.strip())), ("assistant", record["output"])]
    elif "prompt" in record and "completion" in record:
        turns += [("user", record["prompt"]), ("assistant", record["completion"])]
    else:
        found = ", ".join(map(str, record)) or "none"
        raise DataError(f"{where}: unknown form of row; expected {FORMS}, found {found}")
    return checked(turns)


def checked(turns: Iterable[tuple[object, object]]) -> tuple[Message, ...]:
    """Returns (role, text) pairs as messages. Raises Dropped: no answer at the end, an unknown role, an empty text."""
    messages = []
    for role, content in turns:
        if role not in ROLES:
            raise Dropped(f"unknown role {str(role)[:40]!r}")
        if content is not None and not isinstance(content, str):
            raise Dropped("a text is no string")
        messages.append({"role": ROLES[role], "content": (content or "").strip()})
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise Dropped("no answer")
    if not all(message["content"] for message in messages):
        raise Dropped("an empty message")
    if messages[0]["role"] == "assistant" or len(messages) < 2:
        raise Dropped("no question")
    return tuple(messages)


def _turns(listed: object) -> Iterator[tuple[object, object]]:
    if not isinstance(listed, list):
        raise Dropped("no answer")
    for turn in listed:
        if not isinstance(turn, Mapping):
            raise Dropped("a message is no object")
        role = turn.get("role", turn.get("from"))
        yield (role if isinstance(role, str) else str(role)), turn.get("content", turn.get("value"))


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """Yields (where, record) of a .json or .jsonl file. Raises DataError with `file:line`."""
    if not path.is_file():
        near = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else ()
        raise DataError(f"data file {path} does not exist.{did_you_mean(path.name, near)}")
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: unknown kind of conversations. Valid: .json, .jsonl.")
    try:
        yield from rows.json_records(path)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from error


def _hub(source: str) -> Iterator[tuple[str, object]]:
    near = did_you_mean(source, PACKAGED)
    if "/" not in source or source.partition("/")[0] == "alpaca":  # a slip of the pen: no half minute of retries
        raise DataError(f"unknown conversations {source!r}.{near}")
    yield from ((f"{source}: row {row}", record) for row, record in enumerate(rows.hub(source, near, split="train"), 1))
