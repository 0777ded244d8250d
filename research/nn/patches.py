"""Images as tokens: patches by unfolding, and fixed sine-cosine tables of their places (arXiv 2010.11929, section 3.1).

A patch embedding is the convolution whose stride is its size; written as unfold and Linear, a PEFT node can sit on it.
"""

import flax.linen as nn
import jax
import numpy as np

from research.errors import ModelError
from research.nn.linear import Linear
from research.nn.time import frequencies


def divides(patch: int, height: int, width: int, of: str = "image size") -> None:
    """ModelError where the patch does not divide height and width, sides `of` what; it names those that do."""
    if patch < 1 or height % patch or width % patch:
        valid = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
        size = height if height == width else f"{height}x{width}"
        raise ModelError(f"patch {patch} does not divide {of} {size}. Valid: {', '.join(map(str, valid))}.")


def unfold(images: jax.Array, patch: int) -> jax.Array:
    """images [B, H, W, C] -> [B, N, P*P*C]: patches row by row, and pixels row by row with channels last in each.

    ModelError where the patch does not divide height and width.
    """
    batch, height, width, channels = images.shape
    divides(patch, height, width)
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def fold(patches: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """The inverse of `unfold`: [B, N, P*P*C] -> [B, H, W, C]."""
    batch, _, size = patches.shape
    x = patches.reshape(batch, height // patch, width // patch, patch, patch, size // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


class Patches(nn.Module):
    """One Linear over every patch: kernel [P*P*C, D]."""

    patch: int
    features: int
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, C] -> [B, N, D], row by row. ModelError where the patch does not divide the size."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Linear(self.features, (None, "embed"), name="project", **types)(unfold(images, self.patch))


def sincos(rows: int, columns: int, features: int) -> np.ndarray:
    """The fixed table [rows*columns, D] of DiT and MAE: a quarter each of sin and cos of the column, then of the row.

    It is a constant and no parameter. ModelError where four do not divide D.
    """
    if features % 4:
        raise ModelError(f"{features} features: a sine-cosine table of two axes needs a multiple of 4.")
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies(features // 4) for axis in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)
