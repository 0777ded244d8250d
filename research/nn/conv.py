"""Convolutions, group norm and change of resolution. They are no sites: PEFT nodes sit at projections only."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import ModelError
from research.nn.param import dense, get_param


class Conv(nn.Module):
    """3x3 convolution, padded to keep the size (halved by stride 2); kernel [3, 3, in, out].

    zero: the kernel starts at 0, for the end of a residual branch; else it keeps the variance of its input.
    """

    features: int
    stride: int = 1
    zero: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H / stride, W / stride, features]."""
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        shape, axes = (3, 3, x.shape[-1], self.features), (None, None, "embed", None)
        kernel = get_param(self, "kernel", init, shape, axes, self.param_dtype)
        bias = get_param(self, "bias", nn.initializers.zeros, (self.features,), (None,), self.param_dtype)
        dtype = jnp.dtype(self.dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(dtype), dense(kernel, dtype), (self.stride, self.stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + bias.astype(dtype)


class GroupNorm(nn.Module):
    """(arXiv 1803.08494): normalises each group of channels over all places, in fp32."""

    groups: int
    eps: float = 1e-5
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> the same shape. ModelError where the groups do not divide the channels."""
        channels = x.shape[-1]
        if channels % self.groups:
            valid = [g for g in range(1, channels + 1) if channels % g == 0]
            raise ModelError(
                f"{self.groups} groups do not divide {channels} channels. Valid: {', '.join(map(str, valid))}."
            )
        scale = get_param(self, "scale", nn.initializers.ones, (channels,), ("norm",), self.param_dtype)
        bias = get_param(self, "bias", nn.initializers.zeros, (channels,), ("norm",), self.param_dtype)
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, channels // self.groups)
        y = jax.nn.standardize(y, axis=(1, 3), epsilon=self.eps).reshape(x.shape)
        return (y * scale + bias).astype(x.dtype)


def upsample(x: jax.Array) -> jax.Array:
    """x [B, H, W, C] -> [B, 2H, 2W, C], each place four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
