"""Leaves that train in part, as files hold them: the chosen elements, or rows, and where they are.

mask [L, 1, 1] of a leaf [L, in, out]  ->  "#mask" [3] its shape, "#index" [n] flat into the mask, "#values" [n, in*out]
"""

from typing import Any

import numpy as np

PARTS = ("#mask", "#index", "#values")


def pack(path: str, leaf: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Three arrays for a leaf and its bool mask, which broadcasts to it; the leaf itself where that is smaller."""
    shape = (1,) * (leaf.ndim - mask.ndim) + mask.shape
    index = np.flatnonzero(mask)
    index = index.astype(np.int32 if mask.size < 2**31 else np.int64)
    values = _rows(leaf, shape)[index]
    if values.nbytes + index.nbytes >= leaf.nbytes:
        return {path: leaf}
    return dict(zip((path + part for part in PARTS), (np.asarray(shape, np.int32), index, values), strict=True))


def unpack(base: np.ndarray, shape: np.ndarray, index: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`base` with the packed values in their places. ValueError or IndexError where they do not fit."""
    shape = tuple(int(n) for n in shape)
    if len(shape) != base.ndim or any(n not in (1, m) for n, m in zip(shape, base.shape, strict=True)):
        raise ValueError(f"a mask {shape} for a leaf {base.shape}")
    rows = _rows(np.array(base), shape)
    if values.shape != (len(index), rows.shape[1]) or not np.all((index >= 0) & (index < len(rows))):
        raise ValueError(f"values {values.shape} for {len(rows)} rows of {rows.shape[1]}")
    rows[index] = values
    chosen, rest = _axes(base.shape, shape)
    order = chosen + rest
    return rows.reshape([base.shape[i] for i in order]).transpose(np.argsort(order))


def _axes(leaf: tuple[int, ...], mask: tuple[int, ...]) -> tuple[list[int], list[int]]:
    chosen = [i for i, (n, m) in enumerate(zip(leaf, mask, strict=True)) if n == m]
    return chosen, [i for i in range(len(leaf)) if i not in chosen]


def _rows(leaf: np.ndarray, mask: tuple[int, ...]) -> Any:
    """The leaf as [mask elements, elements for each of them]."""
    chosen, rest = _axes(leaf.shape, mask)
    return np.ascontiguousarray(leaf.transpose(chosen + rest)).reshape(int(np.prod(mask)), -1)
