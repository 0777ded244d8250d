"""Token and position tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.param import Axes, get_param
from research.nn.sites import record


class Embed(nn.Module):
    """A table [rows, D]; `attend` is the tied output projection."""

    rows: int
    features: int
    axes: Axes = ("vocab", "embed")
    dtype: str = "float32"
    param_dtype: str = "float32"

    def setup(self) -> None:
        self.table = get_param(
            self, "embedding", nn.initializers.normal(0.02), (self.rows, self.features), self.axes, self.param_dtype
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [...] -> [..., D]."""
        return jnp.take(self.table, ids, axis=0).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> logits [..., rows] in fp32."""
        return jnp.einsum("...d,vd->...v", x, self.table.astype(x.dtype), preferred_element_type=jnp.float32)


class Tied(nn.Module):
    """Where an output projection would be that is the token table. It is no site of a node, which would change the
    embeddings too; it is recorded so that this can be said.
    """

    @nn.compact
    def __call__(self, x: jax.Array, logits: jax.Array) -> jax.Array:
        record(self, "tied", (x.shape[-1], logits.shape[-1]), ("embed", "vocab"))
        return logits
