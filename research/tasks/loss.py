"""The one contract between a task and the trainer: numerator and denominator apart.

`loss(variables, batch, rng) -> Loss(sum, weight, metrics)`. The trainer adds sums and weights over micro-batches and
devices and divides once, so that accumulation, packing and sharding are exact. `rng` is None in evaluation: no dropout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Loss(NamedTuple):
    """`sum` [] is differentiated; `weight` [] divides it; `metrics` maps a name to its own (sum [], weight []).

    `outputs`: what the loss was computed from, (logits [..., C], weight [...]), for a method that compares two passes;
    the trainer leaves it alone.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]
    outputs: tuple[jax.Array, jax.Array] | None = None

    def mean(self) -> jax.Array:
        """sum / weight [], and 0 for a batch of no weight."""
        return self.sum / jnp.maximum(self.weight, 1e-12)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] in fp32. logits [..., V], labels [...] int -> [...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def model_variables(variables: dict) -> dict:
    """The collections that the model itself reads; heads belong to the task."""
    return {k: v for k, v in variables.items() if k in ("params", "peft", "shared")}
