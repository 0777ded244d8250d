"""Variable-length examples to rectangular arrays: several to a row, told apart by segments, or one a row.

    segments   0 0 for padding, 1 1 1 2 2 for two documents: attention stays within equal numbers
    positions  0 1 2 0 1: each document counts from 0
    loss_mask  never 1 on the first token of a document, which the end of its neighbour would have to predict

All arrays are int32 [N, T] and go into `batches.Batches`, so that a batch is a function of (seed, step). First fit
decreasing (Johnson 1973) needs at most 11/9 of the fewest rows, plus 6/9 of one.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from research.data.batches import permutation
from research.data.chat import Encoded
from research.errors import DataError, FlagError, did_you_mean

POLICIES = ("drop", "left", "right")
STRATEGIES = ("first_fit", "sequential")
LEAVES = ("tokens", "mask", "loss_mask", "segments", "positions")  # what `Batches(token_leaves=...)` may trim


def truncate(
    examples: Sequence[Encoded], length: int, policy: Literal["drop", "left", "right"] = "drop"
) -> tuple[list[Encoded], dict[str, int]]:
    """Returns examples of at most `length` tokens, and counts by what was done.

    "drop" leaves longer ones out, "left" cuts their beginning, "right" their end. One that keeps no token to learn is
    left out too. Raises FlagError for an unknown policy, DataError if nothing is left.
    """
    if policy not in POLICIES:
        raise FlagError(f"unknown truncation {policy!r}.{did_you_mean(policy, POLICIES)}")
    if length < 2:
        raise FlagError(f"length is {length}; a row needs 2 tokens or more")
    kept, counts = [], {"kept": 0, "cut": 0, "too long": 0, "nothing to learn": 0}
    for example in examples:
        long = len(example.tokens) > length
        if long and policy == "drop":
            counts["too long"] += 1
            continue
        part = slice(len(example.tokens) - length, None) if policy == "left" and long else slice(length)
        short = Encoded(example.tokens[part], example.loss_mask[part])
        if not short.loss_mask[1:].any():  # no token predicts the first one
            counts["nothing to learn"] += 1
            continue
        counts["cut" if long else "kept"] += 1
        kept.append(short)
    if not kept:
        raise DataError(f"no example is left at {length} tokens a row: {counts}")
    return kept, counts


def pack(
    examples: Sequence[Encoded], length: int, strategy: Literal["first_fit", "sequential"] = "first_fit", pad: int = 0
) -> dict[str, np.ndarray]:
    """Returns tokens, mask, loss_mask, segments, positions, int32 [N, T] with T = `length`.

    "first_fit" puts the longest first, each into the first row with room; "sequential" keeps the order of `examples`.
    Raises DataError for an example longer than a row, or none at all.
    """
    if strategy not in STRATEGIES:
        raise FlagError(f"unknown packing {strategy!r}.{did_you_mean(strategy, STRATEGIES)}")
    sizes = np.asarray([len(example.tokens) for example in examples], np.int64)
    _check(sizes, length)
    if strategy == "sequential":
        return _fill(examples, _sequential(sizes, length), length, pad)
    return _fill(examples, _first_fit(sizes, length), length, pad)


def unpacked(examples: Sequence[Encoded], length: int, pad: int = 0) -> dict[str, np.ndarray]:
    """Returns what `pack` does, with one example a row, in order."""
    _check(np.asarray([len(example.tokens) for example in examples], np.int64), length)
    return _fill(examples, [[number] for number in range(len(examples))], length, pad)


def pack_pairs(leaves: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Pairs, several to a row and both sides of one in the same row, by first fit decreasing.

    leaves: {chosen,rejected}_{tokens,mask,completion} [N, T], padded on the right. Returns tokens, mask, completion,
    segments int32 [R, length] and weight float32 [R, P], 1 for each pair of a row, none of which has more than P; pair
    p of a row, from 0, lies in segments 2p + 1 and 2p + 2. Raises DataError as `pack` does.
    """
    sides = [[leaves[f"{side}_{name}"] for name in ("tokens", "completion", "mask")] for side in ("chosen", "rejected")]
    documents = [
        Encoded(tokens[real > 0], learnt[real > 0])
        for pair in zip(*(zip(*side, strict=True) for side in sides), strict=True)
        for tokens, learnt, real in pair
    ]
    sizes = np.asarray([len(each.tokens) for each in documents], np.int64).reshape(-1, 2).sum(axis=1)
    _check(sizes, length)
    packed = _first_fit(sizes, length)
    arrays = _fill(documents, [[d for n in row for d in (2 * n, 2 * n + 1)] for row in packed], length, 0)
    kept = {"completion" if name == "loss_mask" else name: x for name, x in arrays.items() if name != "positions"}
    counts = np.asarray([len(row) for row in packed])
    return kept | {"weight": np.float32(np.arange(counts.max()) < counts[:, None])}


def efficiency(arrays: dict[str, np.ndarray]) -> float:
    """The share of places in the rows that hold a real token, 0 to 1."""
    return float(arrays["mask"].mean())


def by_length(sizes: Sequence[int], batch_size: int, seed: int, step: int) -> np.ndarray:
    """Returns the row numbers [B] of a step, rows of like length together: a function of (seed, step).

    An epoch shuffles the rows, sorts them by length (ties stay shuffled) and takes groups of B in a random order; the
    last len(sizes) mod B rows of the shuffle wait for another epoch.
    """
    sizes = np.asarray(sizes)
    groups = len(sizes) // batch_size if batch_size > 0 else 0
    if not groups:
        raise FlagError(f"batch_size is {batch_size}; with {len(sizes)} rows it may be 1 to {len(sizes)}")
    epoch, turn = divmod(step, groups)
    shuffled = permutation(seed, epoch, len(sizes))[: groups * batch_size]
    ordered = shuffled[np.argsort(sizes[shuffled], kind="stable")].reshape(groups, batch_size)
    return ordered[permutation(seed + 1, epoch, groups)[turn]]


def _check(sizes: np.ndarray, length: int) -> None:
    if not len(sizes):
        raise DataError("no examples to pack")
    if sizes.max() > length:
        raise DataError(f"example {int(sizes.argmax()) + 1} has {sizes.max()} tokens, a row {length}: truncate first")


def _sequential(sizes: np.ndarray, length: int) -> list[list[int]]:
    packed, left = [], 0
    for number, size in enumerate(sizes):
        if size > left:
            packed.append([])
            left = length
        packed[-1].append(number)
        left -= size
    return packed


def _first_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
    packed, room = [], np.full(len(sizes), length)  # rooms of rows not opened yet are whole
    for number in np.argsort(-sizes, kind="stable"):
        row = int(np.argmax(room >= sizes[number]))
        if row == len(packed):
            packed.append([])
        packed[row].append(int(number))
        room[row] -= sizes[number]
    return packed


def _fill(examples: Sequence[Encoded], packed: list[list[int]], length: int, pad: int) -> dict[str, np.ndarray]:
    arrays = {name: np.zeros((len(packed), length), np.int32) for name in LEAVES}
    arrays["tokens"][:] = pad
    for row, numbers in enumerate(packed):
        start = 0
        for segment, number in enumerate(numbers, 1):
            example = examples[number]
            here = slice(start, start + len(example.tokens))
            arrays["tokens"][row, here] = example.tokens
            arrays["mask"][row, here] = 1
            arrays["segments"][row, here] = segment
            arrays["positions"][row, here] = np.arange(len(example.tokens))
            arrays["loss_mask"][row, here] = example.loss_mask
            arrays["loss_mask"][row, start] = 0
            start += len(example.tokens)
    return arrays
