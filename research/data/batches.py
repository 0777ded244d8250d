"""Batches as a pure function of the step: a run's place in its data is its step number, and nothing else is saved.

Training reads one endless stream: the rows in the order of epoch 0, then of epoch 1, and so on, each a permutation of
its own. Step s takes rows s*B to (s+1)*B of that stream, so a batch may span two epochs and no row is ever lost.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from research.errors import DataError, FlagError, did_you_mean

TOKEN_LEAVES = ("tokens", "mask")  # leaves [N, T] whose columns are trimmed together, by "mask"


@lru_cache(maxsize=64)
def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Returns the order of `rows` rows in an epoch, [rows].

    Sorting raw Philox words rather than calling `Generator.permutation`: NumPy keeps the words the same for ever, the
    methods built on them only within a version.
    """
    key = np.asarray([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(rows), kind="stable")
    order.setflags(write=False)
    return order


class Batches:
    """Training batches of N rows. Leaves [M, B/M, ...]: M micro-batches; with several seeds [S, M, B/M, ...].

    A leaf `weight` [N] float32 of ones is added unless `arrays` has one.

    Args:
      arrays: leaves [N, ...].
      batch_size: B, rows a step (and seed) over all micro-batches.
      seed: of the order of rows. A sequence of seeds gives leaves with a leading axis S, whose entry i is what seed i
        alone gives (but trimmed to the longest row of all seeds).
      micro_batches: M, a divisor of B.
      shuffle: False keeps the order of `arrays` in every epoch.
      trim_multiple: cut the `token_leaves` of a batch to its longest row rounded up to this; None never cuts. Every
        width is a shape to compile, so 16 or 32 rather than 1.
      token_leaves: leaves [N, T] to cut.

    Raises:
      DataError: no rows, or leaves of different length. FlagError: a batch size or division that does not fit.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        seed: int | Sequence[int] = 0,
        micro_batches: int = 1,
        shuffle: bool = True,
        trim_multiple: int | None = None,
        token_leaves: Sequence[str] = TOKEN_LEAVES,
    ):
        self.arrays, self.rows = _checked(arrays, trim_multiple)
        if not 1 <= batch_size <= self.rows:
            raise FlagError(f"batch_size is {batch_size}; with {self.rows} training rows it may be 1 to {self.rows}")
        if micro_batches < 1 or batch_size % micro_batches:
            divisors = [str(n) for n in range(1, batch_size + 1) if batch_size % n == 0]
            nearest = did_you_mean(str(micro_batches), divisors)
            raise FlagError(f"micro_batches is {micro_batches}, no divisor of batch_size {batch_size}.{nearest}")
        self.batch_size, self.micro_batches, self.shuffle = batch_size, micro_batches, shuffle
        self.seeds = (seed,) if isinstance(seed, int | np.integer) else tuple(seed)
        self.several = not isinstance(seed, int | np.integer)
        self.trim_multiple, self.token_leaves = trim_multiple, tuple(token_leaves)

    @property
    def steps_per_epoch(self) -> float:
        return self.rows / self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """Returns the row numbers of a step: [B], or [S, B] with several seeds."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        stream = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(stream, self.rows)
        if not self.shuffle:
            found = np.broadcast_to(offsets, (len(self.seeds), self.batch_size))
        else:
            found = np.empty((len(self.seeds), self.batch_size), np.int64)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                for row, seed in enumerate(self.seeds):
                    found[row, here] = permutation(int(seed), int(epoch), self.rows)[offsets[here]]
        return found if self.several else found[0]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns the leaves of a step: [M, B/M, ...], or [S, M, B/M, ...] with several seeds."""
        rows = self.indices(step)
        split = (*rows.shape[:-1], self.micro_batches, -1)
        columns = _columns(self.arrays, rows.ravel(), self.trim_multiple)
        return {
            name: (leaf[:, columns] if name in self.token_leaves else leaf)[rows.reshape(split)]
            for name, leaf in self.arrays.items()
        }

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches of steps start, start + 1, ... up to (not with) `stop`; for ever by default."""
        step = start
        while stop is None or step < stop:
            yield self.batch(step)
            step += 1


def eval_batches(
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    trim_multiple: int | None = None,
    token_leaves: Sequence[str] = TOKEN_LEAVES,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every row once, in order, in leaves [B, ...]; copies of row 0 with weight 0 fill up the last batch.

    Copies of a real row rather than zeros: a row without a real token could give NaN, and 0 * NaN is NaN.
    """
    arrays, rows = _checked(arrays, trim_multiple)
    if batch_size < 1:
        raise FlagError(f"batch_size is {batch_size}; it must be 1 or more")
    for start in range(0, rows, batch_size):
        taken = np.zeros(batch_size, np.int64)
        real = min(batch_size, rows - start)
        taken[:real] = np.arange(start, start + real)
        columns = _columns(arrays, taken[:real], trim_multiple)
        batch = {name: (leaf[:, columns] if name in token_leaves else leaf)[taken] for name, leaf in arrays.items()}
        batch["weight"][real:] = 0
        yield batch


def _checked(arrays: Mapping[str, np.ndarray], trim_multiple: int | None) -> tuple[dict[str, np.ndarray], int]:
    """Returns the leaves with `weight` among them, and N."""
    arrays = {name: np.asarray(leaf) for name, leaf in arrays.items()}
    lengths = {name: len(leaf) for name, leaf in arrays.items()}
    if not lengths or not min(lengths.values()):
        raise DataError("no rows to make batches of")
    if len(set(lengths.values())) > 1:
        raise DataError(f"leaves of different length: {', '.join(f'{n} {size}' for n, size in lengths.items())}")
    if trim_multiple is not None and trim_multiple < 1:
        raise FlagError(f"trim_multiple is {trim_multiple}; it must be 1 or more")
    rows = next(iter(lengths.values()))
    arrays.setdefault("weight", np.ones(rows, np.float32))
    return arrays, rows


def _columns(arrays: Mapping[str, np.ndarray], rows: np.ndarray, multiple: int | None) -> slice:
    """Returns the columns that hold all real tokens of `rows`, on the side where rows are not padded."""
    if multiple is None:
        return slice(None)
    mask = arrays["mask"]
    width = mask.shape[1]
    used = np.flatnonzero(mask[rows].any(axis=0))
    if not used.size:
        return slice(None)
    left_padded = mask[:, -1].all() and not mask[:, 0].all()
    longest = width - used[0] if left_padded else used[-1] + 1
    kept = min(width, -(-int(longest) // multiple) * multiple)
    return slice(width - kept, width) if left_padded else slice(0, kept)
