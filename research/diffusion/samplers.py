"""Samplers: functions of a denoiser under one lax.scan over the steps from t to s of a grid of times.

With (a, b) = (alpha, sigma), and (x0, eps) the denoiser's at (x_t, t):

    ddim      x_s = a_s x0 + sqrt(b_s^2 - c^2) eps + c z,  c^2 = eta^2 (b_s^2 / b_t^2) (b_t^2 - (a_t / a_s)^2 b_s^2)
                                                                                            2010.02502 eq. 12, 16
    ddpm      ddim with eta = 1: c^2 is the variance of the posterior q(x_s | x_t, x0)      2006.11239 eq. 7
    euler     x_s = x_t + (a_s - a_t) x0 + (b_s - b_t) eps, which is ddim with eta = 0
    heun      the same with x0 and eps averaged over both ends of the step; euler in a step to b_s = 0
    dpmpp_2m  x_s = (b_s / b_t) x_t + (a_s - a_t b_s / b_t) D,  D = x0 + (x0 - x0_before) h / (2 h_before),
              h the step in log(a / b); D = x0 in the first step and in one to b_s = 0      2211.01095 algorithm 2

Since x_t = a_t x0 + b_t eps, dx = x0 da + eps db for every process. On EDM's process euler and heun are 2206.00364's
algorithm 1 (without churn), on the flow x_s = x_t + (s - t) u and its Heun rule: one function is enough for all.

Noise is keyed by the image's index and the step, so that an image is the same in any batch and on any mesh.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.diffusion.denoiser import Denoiser
from research.diffusion.process import Process
from research.errors import FlagError, did_you_mean

Sampler = Callable[..., jax.Array]
START = 2**31 - 1  # the place of the first noise in an image's random stream, which no step reaches


def image_keys(rng: jax.Array, index: jax.Array) -> jax.Array:
    """One key an image: index int [B], its place in the whole set -> keys [B]."""
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(index)


def noise(keys: jax.Array, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """N(0, I) [B, *shape] from keys [B]; independent between steps."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, step), shape))(keys)


def start(process: Process, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x at process.last, [B, *shape]: sigma(last) times noise."""
    return process.sigma(process.last) * noise(keys, START, shape)


def _pairs(times: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    times = jnp.asarray(times, jnp.float32)
    return times[:-1], times[1:], jnp.arange(len(times) - 1)


def ddim(
    denoise: Denoiser,
    process: Process,
    times: np.ndarray,
    x: jax.Array,
    keys: jax.Array | None = None,
    eta: float = 0.0,
) -> jax.Array:
    """x [B, ...] at times[0] -> [B, ...] at times[-1]; times [N + 1] fall. keys [B] are read when eta > 0.

    Raises FlagError: eta outside [0, 1], or above 0 without keys.
    """
    if not 0 <= eta <= 1:
        raise FlagError(f"eta={eta} must lie in [0, 1]")
    if eta and keys is None:
        raise FlagError(f"eta={eta} draws noise: it needs a key an image")

    def step(x: jax.Array, pair: tuple) -> tuple[jax.Array, None]:
        t, s, i = pair
        x0, eps = denoise(x, t)
        a_s, b_s = process.alpha(s), process.sigma(s)
        if not eta:
            return a_s * x0 + b_s * eps, None
        b_t = process.sigma(t)
        forward = jnp.maximum(b_t**2 - (process.alpha(t) / a_s * b_s) ** 2, 0.0)  # variance of x_t given x_s
        c = eta * b_s / b_t * jnp.sqrt(forward)
        mean = a_s * x0 + jnp.sqrt(jnp.maximum(b_s**2 - c**2, 0.0)) * eps
        return mean + c * noise(keys, i, x.shape[1:]), None

    return jax.lax.scan(step, x, _pairs(times))[0]


ddpm = functools.partial(ddim, eta=1.0)


def euler(
    denoise: Denoiser, process: Process, times: np.ndarray, x: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """First order, N calls of the denoiser; deterministic. Shapes as ddim."""
    return ddim(denoise, process, times, x)


def heun(
    denoise: Denoiser, process: Process, times: np.ndarray, x: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """Second order, 2 N calls, or 2 N - 1 on a grid that ends at sigma = 0; deterministic. Shapes as ddim."""

    def step(x: jax.Array, pair: tuple) -> tuple[jax.Array, None]:
        t, s, _ = pair
        x0, eps = denoise(x, t)
        a_s, b_s = process.alpha(s), process.sigma(s)
        guess = a_s * x0 + b_s * eps

        def correct() -> jax.Array:
            x0_s, eps_s = denoise(guess, s)
            da, db = a_s - process.alpha(t), b_s - process.sigma(t)
            return x + da * (x0 + x0_s) / 2 + db * (eps + eps_s) / 2

        return jax.lax.cond(b_s > 0, correct, lambda: guess), None

    return jax.lax.scan(step, x, _pairs(times))[0]


def dpmpp_2m(
    denoise: Denoiser, process: Process, times: np.ndarray, x: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """Second order, N calls; deterministic. Shapes as ddim."""

    def step(carry: tuple, pair: tuple) -> tuple[tuple, None]:
        x, before, h_before = carry
        t, s, i = pair
        x0, _ = denoise(x, t)
        a_t, b_t, a_s, b_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
        h = (process.log_snr(s) - process.log_snr(t)) / 2
        # A step of infinite length (from alpha = 0, to sigma = 0) has no slope to extrapolate by.
        slope = jnp.where((i > 0) & (b_s > 0) & jnp.isfinite(h), h / (2 * h_before), 0.0)
        d = x0 + slope * (x0 - before)
        return (b_s / b_t * x + (a_s - a_t * b_s / b_t) * d, x0, h), None

    first = (x, jnp.zeros_like(x), jnp.float32(1.0))
    return jax.lax.scan(step, first, _pairs(times))[0][0]


def invert(denoise: Denoiser, process: Process, times: np.ndarray, x: jax.Array) -> jax.Array:
    """DDIM backwards: x [B, ...] at times[-1] -> [B, ...] at times[0], which `ddim` brings back (2010.02502 4.3).

    Exact as the number of steps grows. The grid must end above sigma = 0 (a data point is x at a small time) unless
    the network predicts eps, v or flow, which give eps there.
    """
    return ddim(denoise, process, np.asarray(times)[::-1], x)


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def sampler(name: str) -> Sampler:
    """`(denoise, process, times, x, keys) -> images`. Raises FlagError: an unknown name."""
    if name not in SAMPLERS:
        raise FlagError(f"unknown sampler {name!r}.{did_you_mean(name, SAMPLERS)}")
    return SAMPLERS[name]


def sample(
    name: str,
    denoise: Denoiser,
    process: Process,
    times: np.ndarray,
    rng: jax.Array,
    index: jax.Array,
    shape: tuple[int, ...],
    **options: float,
) -> jax.Array:
    """Images [B, *shape] number `index` int [B] of the set `rng`: each a function of (rng, index, label) alone."""
    keys = image_keys(rng, index)
    draw = sampler(name)
    return draw(denoise, process, times, start(process, keys, shape), keys, **options)
