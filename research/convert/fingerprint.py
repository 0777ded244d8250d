"""The identity of a base: an adapter is refused on weights other than those it was trained on."""

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from research.peft import tree

# How the same function is computed, and what the family is called (a GGUF file calls Mistral a LLaMA).
NOT_FUNCTIONAL = ("dtype", "param_dtype", "scan", "remat", "kernel", "family")


def fingerprint(params: tree.PyTree, config: Any = None) -> str:
    """Returns the SHA-256 (hex) of every leaf's path, shape, dtype and bytes, and of what `config` (a dataclass) makes
    of them: the same weights with another rope scaling, window, epsilon or activation are another base.

    Stacked layers `layers/...` [L, ...] are hashed as `layers_0/...`, `layers_1/...`, so that a scanned and an unrolled
    model of the same weights have one fingerprint. Leaves are hashed apart, in threads (hashing releases the
    interpreter's lock), and the sorted list of their digests once more: 135 M parameters take about half a second.
    """

    def line(item: tuple[str, np.ndarray]) -> str:
        path, value = item
        # Viewed as bytes: ml_dtypes' bfloat16 has no buffer interface of its own.
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return f"{path} {value.dtype.name} {list(value.shape)} {hashlib.sha256(data).hexdigest()}"

    lines: list[str] = []
    with ThreadPoolExecutor() as pool:
        for path, leaf in tree.paths(params).items():  # one leaf at a time is on the host whole
            value, names = _whole(leaf), tree.layer_paths(path, leaf)
            slices = [(path, value)] if names == [path] else list(zip(names, value, strict=True))
            lines += pool.map(line, slices)
    lines.sort()
    if config is not None:
        fields = dataclasses.asdict(config)
        lines += [f"{name} = {_plain(fields[name])}" for name in sorted(fields.keys() - set(NOT_FUNCTIONAL))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _whole(leaf: Any) -> np.ndarray:
    """One leaf on the host; of a leaf whose shards lie with several processes each gets the others'."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _plain(value: Any) -> str:
    """1, 1.0 and a float that went through fp32 (GGUF) are one number; a list and a tuple are one sequence."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.6g}"
    return repr(value)
