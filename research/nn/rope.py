"""Rotary position embedding (arXiv 2104.09864), in Hugging Face's half-split layout."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_dim: int, theta: float, scaling: tuple | None = None) -> np.ndarray:
    """Inverse frequencies [K/2]; scaling ("llama3", factor, low, high, original_max) is Llama 3.1's, ("linear", factor)
    divides all.
    """
    inverse = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling and scaling[0] == "linear":
        inverse = inverse / scaling[1]
    elif scaling:
        _, factor, low, high, original = scaling
        wavelength = 2 * math.pi / inverse
        blend = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        inverse = inverse / factor * (1 - blend) + inverse * blend
    return inverse.astype(np.float32)


def angles(positions: jax.Array, inverse: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """positions [B, T] -> (cos, sin), each [B, T, 1, K/2] fp32."""
    angle = positions[..., None, None].astype(jnp.float32) * inverse
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each pair (x[i], x[i + K/2]) of x [B, T, H, K]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
