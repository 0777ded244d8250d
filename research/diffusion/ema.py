"""Exponential moving average of parameters with a warm-up, as a pure function of pytrees.

    d_n = min(decay, (1 + n) / (10 + n)),   ema_n+1 = d_n ema_n + (1 - d_n) params_n+1        n = 0, 1, ...

Without the warm-up the average would be the initialisation for the first 1 / (1 - decay) steps.
"""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def decay_at(step: jax.Array | int, decay: float, warm_up: bool = True) -> jax.Array:
    """d_n [] fp32 for the step number n from 0."""
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if warm_up else jnp.float32(decay)


def update(ema: PyTree, params: PyTree, step: jax.Array | int, decay: float, warm_up: bool = True) -> PyTree:
    """The average after one more step, in the dtypes of `ema`; integer leaves are taken from `params`.

    For PEFT give it `state.trainable` and nothing else: the frozen leaves are holes (None) there and cost neither
    memory nor time; to sample, `state.merge(ema, extra, frozen)` puts the average beside the frozen base, the very
    same buffers. Start from an fp32 copy of the trainable leaves: in bf16 the average stands still where 1 - d is
    below 2^-9. `step` is the number of updates before this one.
    """
    d = decay_at(step, decay, warm_up)

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        wide = old.astype(jnp.float32)
        return (d * wide + (1 - d) * new.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(leaf, ema, params)
