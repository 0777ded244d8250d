"""Parameters with logical axes, which may be quantised nodes, and the rng that marks training."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Axes = tuple[str | None, ...]


def get_param(
    module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...], axes: Axes, dtype: str
) -> Any:
    """Like `module.param`, with logical axes, and without its shape check: a quantised leaf has its own shapes."""
    if module.has_variable("params", name):
        return nn.unbox(module.get_variable("params", name))
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype))


def is_quantised(x: Any) -> bool:
    """Whether a leaf stands for an array that it has to be made into."""
    return hasattr(x, "dequantise")


def dense(w: Any, dtype: jnp.dtype) -> jax.Array:
    """The kernel as an array: quantised nodes know how to become one."""
    return w.dequantise(dtype) if is_quantised(w) else w.astype(dtype)


def training_rng(module: nn.Module) -> jax.Array | None:
    """A fresh key where the model was applied with a `dropout` rng, that is in training; else None."""
    return module.make_rng("dropout") if module.has_rng("dropout") else None


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Zeroes elements with probability `rate` and rescales the rest; the identity without an rng.

    Draws 16 random bits an element: half the cost of a uniform float, and the rate is met to 2**-16.
    """
    if rng is None or rate == 0.0:
        return x
    dropped = min(round(rate * 65536), 65535)
    kept = jax.random.bits(rng, x.shape, jnp.uint16) >= jnp.uint16(dropped)
    return jnp.where(kept, x / jnp.asarray(1.0 - dropped / 65536, x.dtype), jnp.zeros((), x.dtype))
