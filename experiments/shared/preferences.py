"""From preferences to arrays: what `preference`, `reward_model` and `best_of_n` share.

    pairs    prompt, chosen, rejected; optional margin and probability   "dpo/en", "dpo/zh", a file, a hub id
    judged   an answer and whether it was liked                          "kto/en", a file, a hub id, or pairs apart
    rated    two texts and P(first beats second) of their raters         "vader/movie", ..., or "smoke" (bundled)

A row that can't teach is left out and counted by its reason. All leaves are flat, `chosen_tokens`, `chosen_mask`, ...,
[N, T], so that `batches.Batches` takes them; `nest` makes of them what the losses read.
"""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.data import pairs, rows, text
from research.data.assets import fetch
from research.data.chat import TEMPLATES, Chat, PrefixError
from research.data.instructions import Dropped, Message, conversation, read_records
from research.data.packing import efficiency, pack_pairs
from research.data.text import PARTS, split_of
from research.errors import DataError, FlagError, ModelError, did_you_mean
from research.rl.pairs import rotate

PACKAGED = pairs.PACKAGED | {"kto/en": pairs.KTO}
RATED = (*text.VADER, "smoke")
VALID_TEMPLATES = ("own", "text", *TEMPLATES)
SIDES = ("chosen", "rejected", "mismatched")

Leaves = dict[str, np.ndarray]


class Encoder:
    """Messages to tokens, by a chat template or as text.

    template: "own" (the tokenizer's), a name of `chat.TEMPLATES`, or "text": the prompt, a space, the answer and the
    token that ends a text. None: "own" where the tokenizer has a template, else "text".

    Raises FlagError: no such template. ModelError: the tokenizer lacks what it needs.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        self.tokenizer, self.template = tokenizer, template or ("own" if tokenizer.chat_template else "text")
        if self.template not in VALID_TEMPLATES:
            raise FlagError(f"unknown template {template!r}.{did_you_mean(template, VALID_TEMPLATES)}")
        self.name = None if self.template == "own" else self.template  # as an adapter names it
        self.chat = None if self.template == "text" else Chat(tokenizer, self.name)
        ends = [x for x in (tokenizer.eos_token_id, tokenizer.sep_token_id) if x is not None]
        if self.chat is None and not ends:
            raise ModelError("template 'text' ends an answer with the end-of-text token; this tokenizer has none")
        self.end = self.chat.closing if self.chat else ends[0]
        self.stop = self.chat.stop_tokens if self.chat else tuple(ends)

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """The tokens [T] int32 that an answer follows."""
        if self.chat:
            return self.chat.prompt(messages)
        return self.open("\n".join(message["content"] for message in messages))

    def open(self, words: str) -> np.ndarray:
        """The tokens [T] int32 of a text that goes on: without the one that ends it."""
        ids = self.tokenizer(words)["input_ids"]
        return np.asarray(ids[:-1] if ids and ids[-1] in self.stop else ids, np.int32)

    def answered(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and last answer, its closing token included; Dropped where a token lies across their border."""
        asked = self.prompt(messages[:-1])
        if self.chat is None:
            said = self.tokenizer(" " + messages[-1]["content"], add_special_tokens=False)["input_ids"]
            return asked, np.asarray([*said, self.end], np.int32)
        try:
            whole = self.chat.encode(messages)
        except PrefixError:
            raise Dropped("a token lies across the border of prompt and answer") from None
        return asked, whole.tokens[len(asked) : np.flatnonzero(whole.loss_mask)[-1] + 1]

    def whole(self, words: str) -> tuple[np.ndarray, np.ndarray]:
        """A text without a prompt, ended."""
        return np.zeros(0, np.int32), np.append(self.open(words), np.int32(self.end))


class Data(NamedTuple):
    """Leaves [N, ...] of each part ("train", "validation", "test"); lines to print; a picture of the first row."""

    parts: dict[str, Leaves]
    notes: tuple[str, ...]
    shown: str

    @property
    def width(self) -> int:
        """Tokens of a row, T."""
        return max(leaf.shape[1] for leaf in self.parts["train"].values() if leaf.ndim > 1)

    def packed(self) -> "Data":
        """The same pairs, as many as fit to a row that is twice as wide: one pair of the longest always does."""
        length = 2 * self.width
        parts = {part: pack_pairs(leaves, length) for part, leaves in self.parts.items()}
        apart = [leaves[f"{side}_mask"] for leaves in self.parts.values() for side in ("chosen", "rejected")]
        masks = apart, [leaves["mask"] for leaves in parts.values()]
        before, now = (100 * efficiency({"mask": np.concatenate(x)}) for x in masks)
        note = f"packed: {now:.0f} % of the places in rows hold a token, {before:.0f} % before"
        return self._replace(parts=parts, notes=(*self.notes, note))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any leaf."""
        digest = hashlib.sha256()
        for part in sorted(self.parts):
            for name, leaf in sorted(self.parts[part].items()):
                digest.update(f"{part} {name} {leaf.shape} {leaf.dtype}".encode())
                digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Judgement:
    """A pair where `rejected` is there, else an answer that was `liked` or not. margin and probability of a pair."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str | None = None
    liked: bool = True
    margin: float = 0.0
    probability: float = 1.0

    def messages(self, answer: str) -> list[Message]:
        return [*self.prompt, {"role": "assistant", "content": answer}]


# ------------------------------------------------------------------------------------------------- reading


def read(source: str) -> tuple[list[Judgement], Counter]:
    """The rows of a source, and how many were left out for which reason.

    Raises DataError: an unknown source, a row of another form, no row at all.
    """
    kept, dropped = [], Counter()
    for where, record in _records(source):
        try:
            kept.append(_judgement(record, where))
        except Dropped as reason:
            dropped[str(reason)] += 1
    if not kept:
        raise DataError(f"{source}: no row to learn from: {dict(dropped) or 'it has no rows'}")
    return kept, dropped


def _records(source: str) -> Iterator[tuple[str, object]]:
    path, near = Path(source).expanduser(), did_you_mean(source, (*PACKAGED, *RATED))
    if source in PACKAGED:
        yield from read_records(fetch("llamafactory") / PACKAGED[source])
    elif path.suffix in (".json", ".jsonl") or path.exists():
        yield from read_records(path)
    elif "/" not in source or source.partition("/")[0] in ("dpo", "kto", "vader"):
        raise DataError(f"unknown preferences {source!r}.{near}")  # a slip of the pen: no half minute of retries
    else:
        found = rows.hub(source, near, split="train")
        yield from ((f"{source}: row {number}", record) for number, record in enumerate(found, 1))


def _judgement(record: object, where: str) -> Judgement:
    if isinstance(record, Mapping) and "label" in record and "chosen" not in record:
        if record["label"] not in (True, False):
            raise DataError(f"{where}: the label is {str(record['label'])[:40]!r}, expected true or false")
        *prompt, answer = conversation(record, where)
        return Judgement(tuple(prompt), answer["content"], liked=bool(record["label"]))
    pair = pairs.pair_of(record, where)
    weight = {name: _number(record, name, start, where) for name, start in (("margin", 0.0), ("probability", 1.0))}
    if not 0 <= weight["probability"] <= 1:
        raise DataError(f"{where}: the probability is {weight['probability']}, expected 0 to 1")
    return Judgement(pair.prompt, pair.chosen, pair.rejected, **weight)


def _number(record: Mapping, name: str, otherwise: float, where: str) -> float:
    value = record.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: the {name} is {str(value)[:40]!r}, expected a number")
    return float(value)


# ------------------------------------------------------------------------------------------------- encoding


def load_pairs(source: str, encoder: Encoder, max_length: int, *, weighed: bool = False) -> Data:
    """Pairs in rows of at most `max_length` tokens: {chosen,rejected}_{tokens,mask,completion} [N, T]; where `weighed`
    the rows' margin and target [N] too, which a reward model takes.

    An answer is cut at its end; a pair whose prompt leaves no room, or that is equal once cut, is left out.
    """
    kept, dropped = read(source)
    if any(row.rejected is None for row in kept):
        raise DataError(f"{source} has answers judged one by one, not in pairs: it is for --loss=kto.")

    def encode(row: Judgement) -> tuple:
        sides = [cut(encoder.answered(row.messages(x)), max_length) for x in (row.chosen, row.rejected)]
        if np.array_equal(sides[0][1], sides[1][1]):
            raise Dropped("both answers are the same once they are cut")
        return sides[0], sides[1], row

    def leaves(found: list, width: int) -> Leaves:
        out = {}
        for place, side in enumerate(("chosen", "rejected")):
            out |= prefixed(side, fill([row[place] for row in found], width))
        given = {"margin": [row[2].margin for row in found], "target": [row[2].probability for row in found]}
        return out | {name: np.asarray(x, np.float32) for name, x in given.items() if weighed}

    return _assemble(source, kept, dropped, encode, leaves, encoder, max_length)


def load_judged(source: str, encoder: Encoder, max_length: int) -> Data:
    """Answers judged one by one, or pairs taken apart (all chosen ones first): {tokens,mask,completion} [N, T],
    desirable int32 [N], and mismatched_*: the row's prompt with the next row's answer.
    """
    kept, dropped = read(source)
    replace = dataclasses.replace
    apart = [replace(r, rejected=None) for r in kept]
    apart += [replace(r, chosen=r.rejected, rejected=None, liked=False) for r in kept if r.rejected is not None]

    def encode(row: Judgement) -> tuple:
        return cut(encoder.answered(row.messages(row.chosen)), max_length), row

    def leaves(found: list, width: int) -> Leaves:
        sides = [row[0] for row in found]
        other = [cut((sides[i][0], sides[j][1]), width) for i, j in enumerate(rotate(len(sides)))]
        liked = np.asarray([row[1].liked for row in found], np.int32)
        return fill(sides, width) | {"desirable": liked} | prefixed("mismatched", fill(other, width))

    return _assemble(source, apart, dropped, encode, leaves, encoder, max_length)


def _assemble(source: str, kept: list, dropped: Counter, encode, leaves, encoder: Encoder, max_length: int) -> Data:
    parts, was_cut = {part: [] for part in PARTS}, 0
    for row in kept:
        try:
            found = encode(row)
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        was_cut += any(side[1][-1] != encoder.end for side in found[:-1])
        parts[split_of("\n".join(message["content"] for message in row.prompt))].append(found)
    for part, found in parts.items():
        if not found:
            rest = f"; left out: {dict(dropped)}" if dropped else ""
            raise DataError(f"{source}: the {part} part is empty; {len(kept)} rows are too few to split{rest}")
    used = [len(p) + len(a) for found in parts.values() for *sides, _ in found for p, a in sides]
    width = min(max_length, -(-max(used) // 16) * 16)
    notes = [f"{source}: {n} rows left out: {reason}" for reason, n in sorted(dropped.items(), key=lambda x: -x[1])]
    notes += [f"{source}: {was_cut} rows have an answer cut to fit {max_length} tokens"] if was_cut else []
    said = [encoder.tokenizer.decode(side[1]) for side in parts["train"][0][:-1]]
    shown = f"{encoder.tokenizer.decode(parts['train'][0][0][0])}\n-> " + "\n-> ".join(said)
    return Data({part: leaves(found, width) for part, found in parts.items()}, tuple(notes), shown)


def cut(side: tuple[np.ndarray, np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The answer cut at its end. Dropped where the prompt leaves no token to it."""
    prompt, answer = side
    if len(prompt) >= width:
        raise Dropped(f"its prompt leaves no room for an answer in {width} tokens")
    return prompt, answer[: width - len(prompt)]


def fill(sides: Sequence[tuple[np.ndarray, np.ndarray]], width: int) -> Leaves:
    """tokens, mask, completion int32 [N, T], padded on the right; masks come from lengths."""
    out = {name: np.zeros((len(sides), width), np.int32) for name in ("tokens", "mask", "completion")}
    for row, (prompt, answer) in enumerate(sides):
        size = len(prompt) + len(answer)
        out["tokens"][row, :size] = np.concatenate([prompt, answer])
        out["mask"][row, :size] = 1
        out["completion"][row, len(prompt) : size] = 1
    return out


def prefixed(side: str, leaves: Leaves) -> Leaves:
    return {f"{side}_{name}": leaf for name, leaf in leaves.items()}


def nest(batch: Mapping[str, Any]) -> dict[str, Any]:
    """{"chosen_tokens": x, "weight": w} -> {"chosen": {"tokens": x}, "weight": w}."""
    out: dict[str, Any] = {}
    for name, leaf in batch.items():
        side, _, rest = name.partition("_")
        if side in SIDES:
            out.setdefault(side, {})[rest] = leaf
        else:
            out[name] = leaf
    return out
