"""The value head of PPO: a linear task head on the policy's own hidden states.

    V_t = hidden_{t-1} . kernel + bias, the return expected before token t is drawn

Zeros at first (arXiv 1909.08593's code), so that the first advantages are those of the rewards alone.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.tasks.loss import model_variables


def init_head(features: int) -> dict[str, jax.Array]:
    """kernel [D, 1] and bias [1] of zeros."""
    return {"kernel": jnp.zeros((features, 1)), "bias": jnp.zeros(1)}


def values(head: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
    """hidden [B, T, D] -> [B, T] fp32, as log-probabilities are placed: t holds V before token t, and 0 at t = 0."""
    v = (hidden.astype(jnp.float32) @ head["kernel"] + head["bias"])[..., 0]
    return jnp.pad(v[:, :-1], ((0, 0), (1, 0)))


class Seen:
    """A model on one batch, whose hidden states [B, T, D] are there already: log-probabilities and values share one
    forward pass.
    """

    def __init__(self, model: nn.Module, variables: dict, batch: dict):
        self.model = model
        self.hidden = model.apply(model_variables(variables), batch["tokens"], batch["mask"])

    def apply(self, variables: dict, *args: Any, **options: Any) -> jax.Array:
        """The hidden states, or what a named method makes of its arguments."""
        return self.model.apply(variables, *args, **options) if "method" in options else self.hidden
