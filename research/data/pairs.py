"""Preferences: published pairs of answers, and soft pairs from what raters said of two texts.

    published   {prompt, chosen, rejected}                     packaged "dpo/en", "dpo/zh", or a .json/.jsonl file
    judged      {prompt, completion, label}                    packaged "kto/en"
    soft        P(a > b), the Bradley-Terry target for two texts with the scores of their raters

P(a > b) is the chance that a rater of a scores it above what a rater of b gives b, ties counted half (the Mann-Whitney
statistic): different people rate the two texts, so that no rater's own order is known. VADER's raters tell how positive
a text is, not how good.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.data.assets import fetch
from research.data.instructions import Dropped, Message, checked, conversation, read_records
from research.data.text import ratings, split_of
from research.errors import DataError, FlagError

PACKAGED = {"dpo/en": "dpo_en_demo.json", "dpo/zh": "dpo_zh_demo.json"}
KTO = "kto_en_demo.json"


@dataclass(frozen=True)
class Pair:
    """Messages that end with a question, and two different answers to it."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    where: str

    @property
    def part(self) -> str:
        """ "train", "validation" or "test", by the hash of the prompt."""
        return split_of("\n".join(message["content"] for message in self.prompt))


@dataclass(frozen=True)
class Judged:
    """Messages that end with an answer, and whether it was liked."""

    messages: tuple[Message, ...]
    liked: bool
    where: str


@dataclass(frozen=True)
class SoftPairs:
    """Texts, and P pairs of them: first, second int32 [P] number the texts; probability float32 [P] is of the first."""

    texts: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    probability: np.ndarray


def load(source: str, *, cache: str | os.PathLike | None = None) -> tuple[tuple[Pair, ...], dict[str, int]]:
    """Returns the pairs of a packaged set or file, and counts of rows left out by reason.

    `prompt` of a row is a string or a list of messages (`conversations` means the same); `chosen` and `rejected` are
    strings or one message. Raises DataError: an unreadable source, a row of another form, no pair at all.
    """
    path = fetch("llamafactory", cache) / PACKAGED[source] if source in PACKAGED else Path(source).expanduser()
    kept, dropped = [], Counter()
    for where, record in read_records(path):
        try:
            kept.append(pair_of(record, where))
        except Dropped as reason:
            dropped[str(reason)] += 1
    if not kept:
        raise DataError(f"{source}: no pairs: {dict(dropped) or 'it has no rows'}")
    return tuple(kept), dict(dropped)


def judged(*, cache: str | os.PathLike | None = None) -> tuple[tuple[Judged, ...], dict[str, int]]:
    """Returns the packaged answers that were liked or not ("kto/en"), and counts of rows left out by reason."""
    kept, dropped = [], Counter()
    for where, record in read_records(fetch("llamafactory", cache) / KTO):
        try:
            kept.append(Judged(conversation(record, where), bool(record["label"]), where))
        except Dropped as reason:
            dropped[str(reason)] += 1
    return tuple(kept), dict(dropped)


def pair_of(record: object, where: str) -> Pair:
    """The pair of a row. Raises DataError for a row of another form, Dropped for one that can't teach."""
    asked = ("prompt", "conversations")
    if not isinstance(record, Mapping) or not {"chosen", "rejected"} <= set(record) or not set(asked) & set(record):
        found = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise DataError(f"{where}: expected prompt, chosen and rejected, found {found or 'none'}")
    prompt = record["prompt"] if "prompt" in record else record["conversations"]
    listed = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    answers = []
    for name in ("chosen", "rejected"):
        answer = record[name]
        if isinstance(answer, Mapping):
            answer = answer.get("content", answer.get("value"))
        if not all(isinstance(turn, Mapping) for turn in listed):
            raise Dropped("a message is no object")
        turns = [(str(t.get("role", t.get("from"))), t.get("content", t.get("value"))) for t in listed]
        answers.append(checked([*turns, ("assistant", answer)]))
    *before, chosen = answers[0]
    rejected = answers[1][-1]
    if chosen["content"] == rejected["content"]:
        raise Dropped("both answers are the same")
    if before[-1]["role"] != "user":
        raise Dropped("no question")
    return Pair(tuple(before), chosen["content"], rejected["content"], where)


def preference(first: np.ndarray, second: np.ndarray) -> float:
    """Returns P(a > b) from the scores of a [raters] and of b [raters]."""
    difference = np.sign(np.asarray(first)[:, None] - np.asarray(second)[None, :])
    return float(0.5 + 0.5 * difference.mean())


def soft_pairs(
    source: str, count: int, seed: int = 0, part: str = "train", *, cache: str | os.PathLike | None = None
) -> SoftPairs:
    """Returns `count` random pairs of texts of one part of a VADER set ("vader/movie", ...), the same for a seed."""
    rated = {}
    for text, scores in ratings(source, cache=cache):
        if split_of(text) == part:
            rated.setdefault(text.strip().lower(), (text.strip(), scores))
    return pair_up(list(rated.values()), count, seed)


def pair_up(rated: list[tuple[str, np.ndarray]], count: int, seed: int = 0) -> SoftPairs:
    """Returns `count` random pairs of different texts among (text, scores [raters])."""
    if len({text for text, _ in rated}) != len(rated):
        raise DataError("a text is rated twice; keep one of them, or it may be paired with itself")
    if len(rated) < 2 or count < 1:
        raise FlagError(f"{count} pairs of {len(rated)} texts: at least 1 pair of 2 texts is needed")
    words = np.random.Philox(key=seed % 2**64).random_raw(2 * count).reshape(2, count)
    first = (words[0] % np.uint64(len(rated))).astype(np.int32)
    other = (words[1] % np.uint64(len(rated) - 1)).astype(np.int32)
    second = (other + (other >= first)).astype(np.int32)  # any text but the first
    chances = [preference(rated[a][1], rated[b][1]) for a, b in zip(first, second, strict=True)]
    return SoftPairs(tuple(text for text, _ in rated), first, second, np.asarray(chances, np.float32))
