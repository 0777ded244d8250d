"""The KL penalty of a reward, and the controllers of its coefficient (arXiv 1909.08593, section 2.2)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from research.errors import FlagError


def shaped(
    logps: jax.Array,
    reference: jax.Array,
    mask: jax.Array,
    score: jax.Array,
    coef: jax.Array | float,
    ended: jax.Array | None = None,
    missing_eos: float = 0.0,
) -> jax.Array:
    """Token rewards [B, T]: -coef k1 on each completion token, and the score [B] on the last one, the EOS.

    ended: bool [B]; a completion without EOS loses `missing_eos`.
    """
    real = mask > 0
    if ended is not None:
        score = score - missing_eos * ~ended
    last = mask.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    at = (jnp.arange(mask.shape[1]) == last[:, None]) & real
    return jnp.where(real, -coef * (logps - reference), 0.0) + at * score[:, None]


@dataclass(frozen=True)
class Fixed:
    """A coefficient that stays."""

    coef: float

    def __post_init__(self) -> None:
        _check(coef=self.coef)

    def update(self, kl: float, samples: int) -> "Fixed":
        return self


@dataclass(frozen=True)
class Adaptive:
    """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon; kl is summed over tokens, in the mean of rows."""

    coef: float
    target: float = 6.0
    horizon: int = 10_000

    def __post_init__(self) -> None:
        _check(coef=self.coef)
        if not (self.target > 0 and self.horizon > 0):
            raise FlagError(f"target={self.target} and horizon={self.horizon} must be above 0")

    def update(self, kl: float, samples: int) -> "Adaptive":
        """The controller after a batch; a kl that is not finite changes nothing."""
        if not math.isfinite(kl):
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return Adaptive(self.coef * (1 + error * samples / self.horizon), self.target, self.horizon)


def _check(coef: float) -> None:
    if not 0 <= coef < math.inf:
        raise FlagError(f"coef={coef} must be finite and at least 0")
