"""The identity of a base: an adapter is refused on weights other than those it was trained on."""

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from research.peft import tree

# How the same function is computed, and what the family is called (a GGUF file calls Mistral a LLaMA).
NOT_FUNCTIONAL = ("dtype", "param_dtype", "scan", "remat", "family")


def fingerprint(params: tree.PyTree, config: Any = None) -> str:
    """Returns the SHA-256 (hex) of every leaf's path, shape, dtype and bytes, and of what `config` (a dataclass) makes
    of them: the same weights with another rope scaling, window, epsilon or activation are another base.

    Stacked layers `layers/...` [L, ...] are hashed as `layers_0/...`, `layers_1/...`, so that a scanned and an unrolled
    model of the same weights have one fingerprint. Leaves are hashed apart, in threads (hashing releases the
    interpreter's lock), and the sorted list of their digests once more: 135 M parameters take about half a second.
    """
    slices: list[tuple[str, np.ndarray]] = []
    for path, leaf in tree.paths(params).items():
        value = np.asarray(leaf)
        names = tree.layer_paths(path, value)
        slices += [(path, value)] if names == [path] else list(zip(names, value, strict=True))

    def line(item: tuple[str, np.ndarray]) -> str:
        path, value = item
        # Viewed as bytes: ml_dtypes' bfloat16 has no buffer interface of its own.
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return f"{path} {value.dtype.name} {list(value.shape)} {hashlib.sha256(data).hexdigest()}"

    with ThreadPoolExecutor() as pool:
        lines = sorted(pool.map(line, slices))
    if config is not None:
        fields = dataclasses.asdict(config)
        lines += [f"{name} = {_plain(fields[name])}" for name in sorted(fields.keys() - set(NOT_FUNCTIONAL))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(value: Any) -> str:
    """1, 1.0 and a float that went through fp32 (GGUF) are one number; a list and a tuple are one sequence."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.6g}"
    return repr(value)
