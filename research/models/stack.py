"""Between a scanned layer stack (`layers`, leading axis L) and an unrolled one (`layers_0`, `layers_1`, ...)."""

import re
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def unstack(params: PyTree) -> PyTree:
    """{"layers": leaf [L, ...]} -> {"layers_0": leaf [...], ...}; an unrolled tree is returned as it is."""
    if "layers" not in params:
        return params
    rest = {k: v for k, v in params.items() if k != "layers"}
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    return rest | {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(depth)}


def stack(params: PyTree) -> PyTree:
    """The inverse of `unstack`."""
    names = sorted((k for k in params if re.fullmatch(r"layers_\d+", k)), key=lambda k: int(k.split("_")[1]))
    if not names:
        return params
    rest = {k: v for k, v in params.items() if k not in names}
    return rest | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *[params[k] for k in names])}
