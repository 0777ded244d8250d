"""Between a scanned layer stack (`layers`, leading axis L) and an unrolled one (`layers_0`, `layers_1`, ...)."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def unstack(params: PyTree) -> PyTree:
    """{"layers": leaf [L, ...]} -> {"layers_0": leaf [...], ...}; an unrolled tree is returned as it is."""
    if "layers" not in params:
        return _inside(unstack, params)
    rest = {k: v for k, v in params.items() if k != "layers"}
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    return rest | {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(depth)}


def stack(params: PyTree) -> PyTree:
    """The inverse of `unstack`."""
    names = sorted((k for k in params if re.fullmatch(r"layers_\d+", k)), key=lambda k: int(k.split("_")[1]))
    if not names:
        return _inside(stack, params)
    rest = {k: v for k, v in params.items() if k not in names}
    return rest | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *[params[k] for k in names])}


def _inside(change: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """The same for stacks further down, as an encoder-decoder has them; the tree itself where there is none."""
    new = {k: change(v) if isinstance(v, dict) else v for k, v in params.items()}
    return params if all(new[k] is params[k] for k in params) else new
