"""What the network predicts, and the way from there to (x0, eps): one converter for every process.

    eps    noise                                              x0 = (x - sigma eps) / alpha
    x0     data                                               eps = (x - alpha x0) / sigma
    v      alpha eps - sigma x0           (2202.00512)        x0 = (alpha x - sigma v) / (alpha^2 + sigma^2)
    flow   eps - x0, the velocity of the straight path        x0 = (x - sigma u) / (alpha + sigma)
    edm    (x0 - c_skip y) / c_out at y = x / alpha, s = sigma / alpha  (2206.00364 table 1), network input c_in y
           c_skip = d^2 / (s^2 + d^2), c_out = s d / sqrt(s^2 + d^2), c_in = 1 / sqrt(s^2 + d^2), d = sigma_data

diffusers' flow target is this one; some papers write data minus noise.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.diffusion.process import Process
from research.errors import FlagError, did_you_mean

KINDS = ("eps", "x0", "v", "flow", "edm")
TINY = 1e-20  # alpha and sigma below it count as it: 1 / TINY is finite in fp32


class Parameterisation(NamedTuple):
    """Functions of alpha = a and sigma = s, [] or [B, 1, ...], and of arrays [B, ...].

    `target`: (x0, eps, a, s) -> what the network should return. `split`: (out, x, a, s) -> (x0, eps). `scale`:
    (a, s) -> factor of the network's input. `gain`: (a, s) -> g, where |x0 error|^2 = g |output error|^2.
    """

    target: Callable[..., jax.Array]
    split: Callable[..., tuple[jax.Array, jax.Array]]
    scale: Callable[..., jax.Array]
    gain: Callable[..., jax.Array]


def parameterisation(kind: str, process: Process, sigma_data: float = 0.5) -> Parameterisation:
    """Args: kind: one of KINDS. sigma_data: standard deviation of the data, read by edm only (0.706 for Fashion-MNIST
    in [-1, 1], 0.5 in the paper).

    Raises FlagError: an unknown kind; eps or edm on a process that ends in pure noise, where they say nothing of x0.
    """
    if kind not in KINDS:
        raise FlagError(f"unknown parameterisation {kind!r}.{did_you_mean(kind, KINDS)}")
    if process.ends_in_noise and kind in ("eps", "edm"):
        raise FlagError(
            f"{kind!r} cannot be predicted on process {process.name!r}, which ends at SNR 0: take v, x0 or flow"
        )
    one = lambda a, s: jnp.ones_like(s)  # noqa: E731
    noise = lambda x0, x, a, s: (x - a * x0) / jnp.maximum(s, TINY)  # noqa: E731
    if kind == "eps":
        split = lambda out, x, a, s: ((x - s * out) / a, out)  # noqa: E731
        return Parameterisation(lambda x0, eps, a, s: eps, split, one, lambda a, s: (s / jnp.maximum(a, TINY)) ** 2)
    if kind == "x0":
        split = lambda out, x, a, s: (out, noise(out, x, a, s))  # noqa: E731
        return Parameterisation(lambda x0, eps, a, s: x0, split, one, one)
    if kind == "v":
        norm = lambda a, s: a**2 + s**2  # noqa: E731
        split = lambda v, x, a, s: ((a * x - s * v) / norm(a, s), (s * x + a * v) / norm(a, s))  # noqa: E731
        return Parameterisation(lambda x0, eps, a, s: a * eps - s * x0, split, one, lambda a, s: (s / norm(a, s)) ** 2)
    if kind == "flow":
        split = lambda u, x, a, s: ((x - s * u) / (a + s), (x + a * u) / (a + s))  # noqa: E731
        return Parameterisation(lambda x0, eps, a, s: eps - x0, split, one, lambda a, s: (s / (a + s)) ** 2)

    d2 = sigma_data**2
    skip = lambda a, s: d2 / ((s / a) ** 2 + d2)  # noqa: E731
    out_scale = lambda a, s: (s / a) * sigma_data / jnp.sqrt((s / a) ** 2 + d2)  # noqa: E731
    in_scale = lambda a, s: 1 / (a * jnp.sqrt((s / a) ** 2 + d2))  # noqa: E731

    def edm_target(x0: jax.Array, eps: jax.Array, a: jax.Array, s: jax.Array) -> jax.Array:
        # (x0 - c_skip (x0 + r eps)) / c_out with r = s / a, without the difference of nearly equal numbers at small r
        r = s / a
        return (r * x0 / sigma_data - sigma_data * eps) / jnp.sqrt(r**2 + d2)

    def edm_split(out: jax.Array, x: jax.Array, a: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        x0 = skip(a, s) * x / a + out_scale(a, s) * out
        # likewise (x - a x0) / s
        return x0, (s / a) * (x / a) / ((s / a) ** 2 + d2) - out * sigma_data / jnp.sqrt((s / a) ** 2 + d2)

    return Parameterisation(edm_target, edm_split, in_scale, lambda a, s: out_scale(a, s) ** 2)
