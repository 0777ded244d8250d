"""NF4 kernels with double quantisation (QLoRA, arXiv 2305.14314, section 3).

    {"q": {"kernel": W[L, in, out]}}
    ->  {"q": {"kernel": NF4(codes[L, in/2, out] uint8, scale: Scales | fp32 [L, in/64, out])}}

    W[i, j] = CODES[code[i, j]] * c2[i // 64, j]          c2 = max |W| of 64 inputs of one column
    c2      = mean + step[., j // 256] * codes[., j]      Scales: the second quantisation

The block of 64 runs along the input, and that of 256 along the output, so that neither crosses a layer, and a mesh that
divides their numbers divides the kernel without a block on two devices. Where 64 or 256 does not divide the dimension
the block is its largest divisor below. A byte holds inputs 2i (low half) and 2i + 1.

Deviations: the paper's blocks run over the flattened matrix; its second quantisation is an 8-bit float, ours int8,
whose largest error is smaller for values that lie in one range.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.errors import ModelError

# Appendix E of the paper. Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
CODES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
BLOCK, SCALE_BLOCK = 64, 256


@struct.dataclass
class Scales:
    """codes [..., n, out] int8 times step [..., n, out/256] fp32, plus mean [...] fp32."""

    codes: Any
    step: Any
    mean: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dequantise(self) -> jax.Array:
        """The scales as fp32 [..., n, out]."""
        codes = self.codes.astype(jnp.float32)
        grouped = codes.reshape(*self.step.shape, -1) * self.step[..., None]
        return grouped.reshape(codes.shape) + self.mean[..., None, None]


@struct.dataclass
class NF4:
    """Two codes a byte, [..., in/2, out] uint8, and the scale of each block of inputs, [..., in/64, out]."""

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], 2 * self.codes.shape[-2], self.codes.shape[-1])

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dequantised_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    def dequantise(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel as an array [..., in, out]."""
        *lead, half, out = self.codes.shape
        scale = self.scale.dequantise() if isinstance(self.scale, Scales) else self.scale
        pairs = jnp.stack([self.codes & 15, self.codes >> 4], axis=-2)  # [..., in/2, 2, out]
        values = jnp.asarray(CODES)[pairs.astype(jnp.int32)].reshape(*lead, scale.shape[-2], -1, out)
        return (values * scale[..., None, :]).reshape(*lead, 2 * half, out).astype(dtype)


def quantise(w: jax.Array, block: int = BLOCK, double: bool = True) -> NF4:
    """w [..., in, out] -> the nearest codes under the blocks' exact scales, which `double` then quantises too.

    Raises ModelError where `in` is odd.
    """
    *lead, d_in, out = w.shape
    if d_in % 2:
        raise ModelError(f"a kernel of shape {tuple(w.shape)} can't be NF4: its inputs must be even in number.")
    w = w.astype(jnp.float32).reshape(*lead, -1, _divisor(d_in, block), out)
    scale = jnp.max(jnp.abs(w), axis=-2)
    between = (CODES[1:] + CODES[:-1]) / 2
    codes = jnp.searchsorted(jnp.asarray(between), w / jnp.where(scale == 0, 1.0, scale)[..., None, :])
    codes = codes.astype(jnp.uint8).reshape(*lead, d_in // 2, 2, out)
    return NF4(codes[..., 0, :] | codes[..., 1, :] << 4, quantise_scales(scale) if double else scale)


def quantise_scales(scale: jax.Array, block: int = SCALE_BLOCK) -> Scales:
    """scale [..., n, out] fp32 -> int8 codes of its distance from the mean of its kernel."""
    mean = jnp.mean(scale, axis=(-2, -1))
    grouped = scale - mean[..., None, None]
    grouped = grouped.reshape(*scale.shape[:-1], -1, _divisor(scale.shape[-1], block))
    step = jnp.max(jnp.abs(grouped), axis=-1) / 127.0
    codes = jnp.round(grouped / jnp.where(step == 0, 1.0, step)[..., None])
    return Scales(codes.astype(jnp.int8).reshape(scale.shape), step, mean)


def axes_of(axes: tuple) -> NF4:
    """The logical axes of the doubly quantised node from its kernel's."""
    return NF4(axes, Scales(axes, axes, axes[:-2]))


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return next(n for n in range(min(size, most), 0, -1) if size % n == 0)
