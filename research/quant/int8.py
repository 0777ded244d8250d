"""Int8 kernels: one scale an output channel, symmetric (arXiv 2208.07339 without its outlier path).

    {"q": {"kernel": W[L, in, out]}}  ->  {"q": {"kernel": Int8(codes[L, in, out] int8, scale[L, out] fp32)}}

The layer dequantises where it multiplies, inside the scan's body, so that one layer at a time is dense. Sharding: codes
keep the kernel's axes, scales its last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Int8:
    """codes [..., in, out] int8 times scale [..., out]."""

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dequantised_dtype(self) -> jnp.dtype:
        return self.scale.dtype

    def dequantise(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel as an array [..., in, out]."""
        return (self.codes.astype(self.scale.dtype) * self.scale[..., None, :]).astype(dtype)


def quantise(w: jax.Array) -> Int8:
    """w [..., in, out] -> the nearest codes under scale = max |column| / 127; a column of zeros stays one."""
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=-2) / 127.0
    codes = jnp.round(w / jnp.where(scale == 0, 1.0, scale)[..., None, :])
    return Int8(codes.astype(jnp.int8), scale)


def axes_of(axes: tuple) -> Int8:
    """The logical axes of the node from its kernel's."""
    return Int8(axes, (*axes[:-2], axes[-1]))
