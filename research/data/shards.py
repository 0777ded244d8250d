"""Token streams on disk, memory-mapped, and windows of them as a pure function of (seed, step).

    directory/index.json     {"format": 1, "parts": {name: {tokens, bytes, dtype, sha256}}, "vocab_size": V}
    directory/<part>.npy     tokens [tokens], uint16 where V allows it, else uint32

`bytes` counts the UTF-8 text behind the tokens, so that nats a token become nats a byte:
nats a byte = nats a token * tokens / bytes. A directory takes its name when all of it is written.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.errors import DataError, FlagError, did_you_mean
from research.files import replace_directory

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Shard:
    """One part: tokens [N] (memory-mapped, uint16 or uint32) and the bytes of text behind them."""

    tokens: np.ndarray
    bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / len(self.tokens)


def write(directory: Path, parts: Mapping[str, tuple[np.ndarray, int]], vocab_size: int) -> None:
    """Writes name -> (tokens [N], bytes of text). Raises DataError for a token outside the vocabulary or no tokens,
    ModelError where the directory holds something else or the disk is full.
    """
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    for name, (tokens, _) in parts.items():
        if not len(tokens):
            raise DataError(f"part {name!r} has no tokens")
        if np.min(tokens) < 0 or np.max(tokens) >= vocab_size:
            raise DataError(f"part {name!r} has a token outside the vocabulary of {vocab_size}")

    def fill(folder: Path) -> None:
        index = {}
        for name, (tokens, size) in parts.items():
            np.save(folder / f"{name}.npy", np.asarray(tokens, dtype))
            digest = _sha256(folder / f"{name}.npy")
            index[name] = {"tokens": len(tokens), "bytes": int(size), "dtype": np.dtype(dtype).name, "sha256": digest}
        content = {"format": FORMAT, "parts": index, "vocab_size": vocab_size}
        (folder / "index.json").write_text(json.dumps(content, indent=1) + "\n")

    needed = sum(len(tokens) for tokens, _ in parts.values()) * np.dtype(dtype).itemsize
    replace_directory(Path(directory), fill, lambda path: (path / "index.json").is_file(), needed)


def load(directory: Path, part: str) -> Shard:
    """Opens a part and checks its digest. Raises DataError: missing, cut short or altered."""
    directory = Path(directory)
    try:
        index = json.loads((directory / "index.json").read_text())
        parts, version = index["parts"], index["format"]
    except FileNotFoundError as error:
        raise DataError(f"{directory} holds no token shards: index.json is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory / 'index.json'} is broken: {str(error) or type(error).__name__}") from error
    if version != FORMAT:
        raise DataError(f"{directory}: token shards of format {version}, this version reads {FORMAT}")
    if part not in parts:
        raise DataError(f"{directory}: no part {part!r}.{did_you_mean(part, parts)}")
    path, entry = directory / f"{part}.npy", parts[part]
    try:
        if _sha256(path) != entry["sha256"]:
            raise DataError(f"{path} is altered or cut short: its sha256 is not that of index.json")
        return Shard(np.load(path, mmap_mode="r", allow_pickle=False), entry["bytes"])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


class Windows:
    """Random windows of a token stream: leaves [M, B/M, T+1] as `batches.Batches` gives them.

    The window of row b at step s starts at the b-th Philox word of the key (seed, s), so a run resumes from its step
    number alone. A window may cross the border of two documents, which the end-of-text token marks.

    Args:
      tokens: [N]. length: T, tokens predicted a row. batch_size: B. micro_batches: M, a divisor of B.

    Raises FlagError: a window longer than the stream, or micro-batches that do not divide the batch.
    """

    def __init__(self, tokens: np.ndarray, length: int, batch_size: int, seed: int = 0, micro_batches: int = 1):
        if not 1 <= length < len(tokens):
            raise FlagError(f"length is {length}; with {len(tokens)} tokens it may be 1 to {len(tokens) - 1}")
        if batch_size < 1 or micro_batches < 1 or batch_size % micro_batches:
            raise FlagError(f"micro_batches is {micro_batches}, no divisor of batch_size {batch_size}")
        self.tokens, self.length, self.seed = tokens, length, seed
        self.batch_size, self.micro_batches = batch_size, micro_batches

    @property
    def steps_per_epoch(self) -> float:
        """Steps that predict as many tokens as the stream has."""
        return len(self.tokens) / (self.batch_size * self.length)

    def starts(self, step: int) -> np.ndarray:
        """Returns where the windows of a step start, [B]."""
        key = np.asarray([self.seed % 2**64, step], np.uint64)
        words = np.random.Philox(key=key).random_raw(self.batch_size)
        return (words % np.uint64(len(self.tokens) - self.length)).astype(np.int64)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns tokens and mask int32 [M, B/M, T+1] (the mask is all ones), weight float32 [M, B/M] of ones."""
        places = self.starts(step)[:, None] + np.arange(self.length + 1)
        tokens = self.tokens[places].astype(np.int32).reshape(self.micro_batches, -1, self.length + 1)
        return {"tokens": tokens, "mask": np.ones_like(tokens), "weight": np.ones(tokens.shape[:2], np.float32)}

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches of steps start, start + 1, ... up to (not with) `stop`; for ever by default."""
        step = start
        while stop is None or step < stop:
            yield self.batch(step)
            step += 1


def consecutive(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Returns tokens and mask int32 [N, T+1] for evaluation: every token but the first is predicted exactly once."""
    if len(tokens) < 2:
        raise DataError(f"{len(tokens)} tokens are too few to predict one")
    count = -(-(len(tokens) - 1) // length)
    places = np.arange(count)[:, None] * length + np.arange(length + 1)
    mask = (places < len(tokens)).astype(np.int32)
    return {"tokens": tokens[np.minimum(places, len(tokens) - 1)].astype(np.int32), "mask": mask}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
