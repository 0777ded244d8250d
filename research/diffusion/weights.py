"""Weights of the loss over time, and the times that are drawn.

A weight is defined on |x0 error|^2 and carried to the network's output by the parameterisation's `gain`, so that every
parameterisation has the same gradient for the same network (2303.09556's min-SNR was long disputed for v):

    uniform   1 on the network's own output
    min_snr   x0 min(snr, g);   eps min(snr, g) / snr;   v min(snr, g) / (snr + 1)          2303.09556 section 3.4
    edm       x0 (s^2 + d^2) / (s d)^2 with s = sigma / alpha: 1 on edm's own output        2206.00364 table 1
    elbo      eps 0.5 |d log snr / dt|: a bound on -log p(x), when t is uniform             2107.00630 eq. 13

A time is a quantile function of u in (0, 1); u is independent, or low-discrepancy: (u0 + i / B) mod 1 (2107.00630
appendix I.1).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.diffusion.parameterise import Parameterisation
from research.diffusion.process import Process
from research.errors import FlagError, did_you_mean

WEIGHTS = ("uniform", "min_snr", "edm", "elbo")
TIMES = ("uniform", "logit_normal", "log_normal")
GOLDEN = 0.6180339887498949


def weight(
    name: str, process: Process, kind: Parameterisation, gamma: float = 5.0, sigma_data: float = 0.5
) -> Callable[[jax.Array], jax.Array]:
    """Returns t [B] -> weights [B] of |target - output|^2. `gamma` is min-SNR's, `sigma_data` EDM's.

    Raises FlagError: an unknown name.
    """
    if name not in WEIGHTS:
        raise FlagError(f"unknown loss weight {name!r}.{did_you_mean(name, WEIGHTS)}")

    def fn(t: jax.Array) -> jax.Array:
        # Clamped so that 0 / 0 at the two ends of the process takes its limit.
        a, s = jnp.maximum(process.alpha(t), 1e-9), jnp.maximum(process.sigma(t), 1e-9)
        if name == "uniform":
            return jnp.ones_like(s)
        gain, snr = kind.gain(a, s), (a / s) ** 2
        if name == "min_snr":
            return jnp.minimum(snr, gamma) * gain
        if name == "edm":
            return (1 / snr + sigma_data**2) * snr / sigma_data**2 * gain
        slope = jnp.abs(jax.vmap(jax.grad(process.log_snr))(t))
        return 0.5 * slope * snr * gain

    return fn


def quantile(
    name: str, process: Process, mean: float | None = None, std: float | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Returns u [B] in (0, 1) -> times [B] between process.first and process.last.

    logit_normal (mean 0, std 1 by default; 2403.03206 eq. 19) stretches sigmoid(N(mean, std^2)) over the range;
    log_normal (-1.2, 1.2; 2206.00364 table 1) is exp(N(mean, std^2)), clipped to it. Raises FlagError: unknown name.
    """
    if name not in TIMES:
        raise FlagError(f"unknown times {name!r}.{did_you_mean(name, TIMES)}")
    first, last = process.first, process.last
    mean = {"log_normal": -1.2}.get(name, 0.0) if mean is None else mean
    std = {"log_normal": 1.2}.get(name, 1.0) if std is None else std

    def fn(u: jax.Array) -> jax.Array:
        if name == "uniform":
            return first + (last - first) * u
        z = mean + std * jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1 - 1e-6))
        return (
            first + (last - first) * jax.nn.sigmoid(z) if name == "logit_normal" else jnp.clip(jnp.exp(z), first, last)
        )

    return fn


def draw(rng: jax.Array | None, count: int, low_discrepancy: bool = True) -> jax.Array:
    """u [count] in [0, 1). Without an rng, the fixed golden-ratio sequence, which is even for any count."""
    if rng is None:
        return jnp.mod((jnp.arange(count) + 0.5) * GOLDEN, 1.0)
    if low_discrepancy:
        # Shuffled: rows that stand together in a batch, such as prior images, shall not share a range of times.
        shift_rng, order_rng = jax.random.split(rng)
        spread = jnp.mod(jax.random.uniform(shift_rng) + jnp.arange(count) / count, 1.0)
        return jax.random.permutation(order_rng, spread)
    return jax.random.uniform(rng, (count,))
