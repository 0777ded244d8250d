"""The identity of a base: an adapter is refused on weights other than those it was trained on."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from research.peft import tree


def fingerprint(params: tree.PyTree) -> str:
    """Returns the SHA-256 (hex) of every leaf's path, shape, dtype and bytes.

    Stacked layers `layers/...` [L, ...] are hashed as `layers_0/...`, `layers_1/...`, so that a scanned and an unrolled
    model of the same weights have one fingerprint. Leaves are hashed apart, in threads (hashing releases the
    interpreter's lock), and the sorted list of their digests once more: 135 M parameters take about half a second.
    """
    slices: list[tuple[str, np.ndarray]] = []
    for path, leaf in tree.paths(params).items():
        value = np.asarray(leaf)
        head, _, rest = path.partition("/")
        if head == "layers":
            slices += [(f"layers_{i}/{rest}", layer) for i, layer in enumerate(value)]
        else:
            slices.append((path, value))

    def line(item: tuple[str, np.ndarray]) -> str:
        path, value = item
        # Viewed as bytes: ml_dtypes' bfloat16 has no buffer interface of its own.
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return f"{path} {value.dtype.name} {list(value.shape)} {hashlib.sha256(data).hexdigest()}"

    with ThreadPoolExecutor() as pool:
        lines = sorted(pool.map(line, slices))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
