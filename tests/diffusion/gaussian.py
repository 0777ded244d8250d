"""Data N(mean, std^2), for which everything has a closed form: the ideal denoiser and the flow from any time to any."""

import jax
import numpy as np

from research.diffusion.process import Process

MEAN, STD = 0.3, 0.5


def ideal(process: Process, mean: float = MEAN, std: float = STD):
    """E[x0 | x_t] and E[eps | x_t]; std 0 is a point mass."""

    def denoise(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = process.alpha(t), process.sigma(t)
        centred = (x - a * mean) / (a**2 * std**2 + b**2)
        return mean + a * std**2 * centred, b * centred

    return denoise


def flowed(process: Process, x: np.ndarray, t: float, s: float) -> np.ndarray:
    """Where the probability-flow ODE takes x from time t to time s, in float64."""
    (a_t, a_s), (b_t, b_s) = ([float(f(np.float32(u))) for u in (t, s)] for f in (process.alpha, process.sigma))
    ratio = np.sqrt((a_s**2 * STD**2 + b_s**2) / (a_t**2 * STD**2 + b_t**2))
    return a_s * MEAN + ratio * (np.asarray(x, np.float64) - a_t * MEAN)
