"""Layer norms, computed in fp32 whatever the compute dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.param import get_param


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis."""

    eps: float
    axis: str = "norm"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, dtype = x.shape[-1], x.dtype
        scale = get_param(self, "scale", nn.initializers.ones, (d,), (self.axis,), self.param_dtype)
        bias = get_param(self, "bias", nn.initializers.zeros, (d,), (self.axis,), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale + bias).astype(dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (scale + offset) over the last axis; Gemma's offset is 1."""

    eps: float
    axis: str = "norm"
    param_dtype: str = "float32"
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = x.dtype
        start = nn.initializers.constant(1.0 - self.offset)
        scale = get_param(self, "scale", start, (x.shape[-1],), (self.axis,), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * (scale + self.offset if self.offset else scale)).astype(dtype)
