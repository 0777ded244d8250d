"""Token and position tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.param import Axes, get_param


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
