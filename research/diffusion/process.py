"""Noising processes: x_t = alpha(t) x0 + sigma(t) eps, with eps ~ N(0, I), for the times between `first` and `last`.

    linear, cosine   variance preserving, T discrete steps, t = n / T        2006.11239, 2102.09672 section 3.2
    zero_snr         any of those, rescaled to alpha(1) = 0                  2305.08891 algorithm 1
    flow             alpha = 1 - t', sigma = t', t' = s t / (1 + (s-1) t)    2209.03003, 2403.03206 section 5.3.2
    edm              alpha = 1, sigma = t                                    2206.00364

Between the steps of a discrete schedule alpha^2 and sigma^2 are interpolated linearly in t: they still add to 1,
and are the table's at t = n / T. The tables are computed in float64, 1 - alpha^2 without cancellation.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError


@dataclasses.dataclass(frozen=True)
class Process:
    """`alpha`, `sigma`: t [...] -> [...] fp32. `condition`: t -> the time that the network is given, [...], of
    order one: its sinusoids count in thousandths.

    `first` is the smallest time that is trained, `last` the time that sampling starts from. `ends_in_noise` says that
    alpha(last) is 0: there x0 does not follow from eps.
    """

    name: str
    alpha: Callable[[jax.Array], jax.Array]
    sigma: Callable[[jax.Array], jax.Array]
    first: float
    last: float = 1.0
    ends_in_noise: bool = False
    condition: Callable[[jax.Array], jax.Array] = lambda t: t

    def log_snr(self, t: jax.Array) -> jax.Array:
        """log(alpha^2 / sigma^2) [...], infinite where one of them is 0."""
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def noised(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """x_t [B, ...] from x0, eps [B, ...] at times t [B]."""
        return wide(self.alpha(t), x0) * x0 + wide(self.sigma(t), x0) * eps


def wide(values: jax.Array, x: jax.Array) -> jax.Array:
    """[B] or [] -> [B, 1, ...] or [], to multiply x [B, ...]."""
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (x.ndim - 1)) if values.ndim else values


def _discrete(name: str, betas: np.ndarray) -> Process:
    if not ((betas > 0) & (betas < 1)).all():
        raise FlagError(f"{name}: every beta must lie in (0, 1); they reach {betas.min():g} and {betas.max():g}")
    log_alphas = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    return _table(name, np.exp(log_alphas), -np.expm1(log_alphas))


def _table(name: str, alphas: np.ndarray, sigmas: np.ndarray) -> Process:
    """From alpha^2 and sigma^2 at t = 0, 1/T, ..., 1, each [T + 1]."""
    steps = len(alphas) - 1
    grid = np.linspace(0, 1, steps + 1)

    def at(table: np.ndarray) -> Callable[[jax.Array], jax.Array]:
        return lambda t: jnp.sqrt(jnp.interp(jnp.asarray(t, jnp.float32), jnp.asarray(grid), jnp.asarray(table)))

    return Process(name, at(alphas), at(sigmas), first=1 / steps, ends_in_noise=bool(alphas[-1] == 0))


def linear(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Process:
    """beta_1 = start, ..., beta_T = end in equal steps (2006.11239 section 4)."""
    return _discrete("linear", np.linspace(start, end, steps))


def cosine(steps: int = 1000, offset: float = 0.008, most: float = 0.999) -> Process:
    """alpha^2 = f(t) / f(0), f = cos^2((t + offset) / (1 + offset) pi / 2), every beta at most `most`."""
    f = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2) ** 2
    return _discrete("cosine", np.minimum(1 - f[1:] / f[:-1], most))


def zero_snr(process: Process) -> Process:
    """Shifts and scales alpha so that alpha(1) = 0 exactly and the first noised step stays as it was.

    Raises FlagError: the process is not one of the discrete ones.
    """
    steps = round(1 / process.first)
    times = np.arange(steps + 1) / steps
    # Out of a trace: a process is often made inside one.
    with jax.ensure_compile_time_eval():
        alpha, sigma = np.asarray(process.alpha(times), np.float64), np.asarray(process.sigma(times), np.float64)
    if process.last != 1 or process.ends_in_noise or not np.allclose(alpha**2 + sigma**2, 1, atol=1e-5):
        raise FlagError(f"process {process.name!r} cannot be rescaled to zero terminal SNR: take linear or cosine")
    rest = (alpha[1:] - alpha[-1]) * alpha[1] / (alpha[1] - alpha[-1])
    alphas = np.concatenate([[1.0], rest**2])
    sigmas = np.concatenate([[0.0, sigma[1] ** 2], 1 - rest[1:] ** 2])
    return dataclasses.replace(_table(f"{process.name}, zero SNR", alphas, sigmas), ends_in_noise=True)


def flow(shift: float = 1.0) -> Process:
    """The straight path from data (t = 0) to noise (t = 1); a shift above 1 spends more of it near noise."""
    if not 0 < shift < math.inf:
        raise FlagError(f"shift={shift} must be a finite number above 0")
    moved = lambda t: shift * t / (1 + (shift - 1) * t)  # noqa: E731
    # (1 - t) / (1 + (s-1) t) is 1 - t' without cancellation. The network is given t'.
    alpha = lambda t: (1 - t) / (1 + (shift - 1) * t)  # noqa: E731
    return Process("flow", alpha, moved, first=1e-3, ends_in_noise=True, condition=moved)


def edm(smallest: float = 0.002, largest: float = 80.0) -> Process:
    """Variance exploding, with the standard deviation of the noise as its time; the network is given log(t) / 4,
    the paper's c_noise.
    """
    return Process(
        "edm",
        lambda t: jnp.ones_like(t, dtype=jnp.float32),
        lambda t: jnp.asarray(t, jnp.float32),
        smallest,
        largest,
        condition=lambda t: jnp.log(t) / 4,
    )


def even_times(process: Process, steps: int, end: float = 0.0) -> np.ndarray:
    """`steps` + 1 equally spaced times from process.last down to `end`: each step goes from one to the next.

    On a discrete schedule of T steps they are indices n / T wherever `steps` divides T.
    """
    return np.linspace(process.last, end, steps + 1).astype(np.float32)


def karras_times(process: Process, steps: int, rho: float = 7.0) -> np.ndarray:
    """[steps + 1] noise levels from the largest to the smallest, equal in sigma^(1/rho), then 0 (2206.00364 eq. 5)."""
    if steps < 2:
        raise FlagError(f"steps={steps}: Karras' grid needs at least 2")
    ramp = np.linspace(process.last ** (1 / rho), process.first ** (1 / rho), steps) ** rho
    return np.append(ramp, 0.0).astype(np.float32)


def log_snr_times(process: Process, steps: int, fine: int = 20001) -> np.ndarray:
    """[steps + 1] times equal in log SNR from process.last to process.first: the grid of DPM-Solver.

    Where alpha(last) is 0 and its log SNR infinite, the equal steps run from last - 1e-3, the first from `last`.
    """
    start = process.last - (1e-3 if process.ends_in_noise else 0.0)
    t = np.linspace(process.first, start, fine)
    log_snr = np.asarray(process.log_snr(jnp.asarray(t)), np.float64)
    wanted = np.linspace(log_snr[-1], log_snr[0], steps + 1)
    times = np.interp(wanted, log_snr[::-1], t[::-1])
    times[0], times[-1] = process.last, process.first
    return times.astype(np.float32)
