"""A network made into a denoiser, (x [B, ...], t []) -> (x0, eps), with classifier-free guidance (2207.12598).

    out = u + w (c - u)                                  c conditional, u unconditional, one network call on 2B rows
    out = phi (std c / std out) out + (1 - phi) out      rescaled, std over an image               2305.08891 eq. 15-16

w = 1 is the conditional model and w = 0 the unconditional one; the paper's own weight is w - 1. Outside `interval`
(2404.07724) the model is the conditional one, in one call on B rows.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.diffusion.parameterise import parameterisation
from research.diffusion.process import Process
from research.errors import FlagError

Network = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
Denoiser = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """`scale` w; `null`: what the unconditional model is told, which is the number of classes, or 0 of texts;
    `interval`: the times of the process where it acts; `rescale` phi in [0, 1].
    """

    scale: float
    null: int
    interval: tuple[float, float] = (0.0, math.inf)
    rescale: float = 0.0

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise FlagError(f"guidance scale={self.scale} must be finite")
        if not 0 <= self.rescale <= 1:
            raise FlagError(f"guidance rescale={self.rescale} must lie in [0, 1]")
        if not self.interval[0] < self.interval[1]:
            raise FlagError(f"guidance interval={self.interval} is empty")


def denoiser(
    network: Network,
    process: Process,
    kind: str,
    told: jax.Array | None = None,
    guidance: Guidance | None = None,
    sigma_data: float = 0.5,
) -> Denoiser:
    """Binds guidance and what the network is told, labels int [B] or texts [B, E], to `network(x [B, ...], t [B], told)
    -> [B, ...]`.

    The denoiser takes a scalar time. Raises FlagError: guidance of nothing; what `parameterisation` refuses.
    """
    if guidance and told is None:
        raise FlagError("guidance needs a model with labels or texts: this one is unconditional")
    p = parameterisation(kind, process, sigma_data)

    def plain(x: jax.Array, t: jax.Array) -> jax.Array:
        return network(x, jnp.full(len(x), t, jnp.float32), told)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        both = jnp.concatenate([told, jnp.full_like(told, guidance.null)])
        out = network(jnp.concatenate([x, x]), jnp.full(2 * len(x), t, jnp.float32), both)
        c, u = jnp.split(out, 2)
        out = u + guidance.scale * (c - u)
        if guidance.rescale:
            axes = tuple(range(1, x.ndim))
            ratio = jnp.std(c, axes, keepdims=True) / jnp.maximum(jnp.std(out, axes, keepdims=True), 1e-12)
            out = (guidance.rescale * ratio + 1 - guidance.rescale) * out
        return out

    def fn(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, s = process.alpha(t), process.sigma(t)
        scaled, seen = p.scale(a, s) * x, process.condition(t)
        if guidance is None or guidance.scale == 1:
            out = plain(scaled, seen)
        elif guidance.interval == (0.0, math.inf):
            out = guided(scaled, seen)
        else:
            low, high = guidance.interval
            out = jax.lax.cond((low <= t) & (t <= high), guided, plain, scaled, seen)
        return p.split(out, x, a, s)

    return fn
