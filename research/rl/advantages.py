"""Advantages: generalised (GAE, arXiv 1506.02438), whitened, and relative to a group of G completions of one prompt.

    GAE       delta_t = R_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}, past the tokens of mask 0
    group     (R - mean) / (std + 1e-4), std with G - 1           GRPO, arXiv 2402.03300
    centred   R - mean                                            Dr.GRPO, arXiv 2503.20783
    leave_one_out  R - mean of the other G - 1                    RLOO, arXiv 2402.14740
    global    (R - mean) / (std + 1e-4) over the whole batch      REINFORCE++, arXiv 2501.03262

A reward that is not finite could not be given: it leaves the mean and its advantage is 0. All of them look at more than
one row, so they are computed once for the whole batch, before it is cut into micro-batches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """rewards, values, mask [B, T] -> advantages, returns = advantages + values, both [B, T] and 0 outside the mask."""
    real = mask > 0
    rewards, values = jnp.where(real, rewards, 0.0), jnp.where(real, values, 0.0)

    def back(carry: tuple, xs: tuple) -> tuple[tuple, jax.Array]:
        reward, value, on = xs
        after, future = carry
        advantage = reward + gamma * future - value + gamma * lam * after
        carry = jnp.where(on, advantage, after), jnp.where(on, value, future)
        return carry, jnp.where(on, advantage, 0.0)

    zero = jnp.zeros(rewards.shape[0])
    _, out = jax.lax.scan(back, (zero, zero), (rewards.T, values.T, real.T), reverse=True)
    return out.T, out.T + values


def whiten(x: jax.Array, mask: jax.Array, shift: bool = True, bessel: bool = False) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-8) over the mask, plus the mean where not `shift`; 0 outside. x, mask [...]."""
    real = mask > 0
    x, count = jnp.where(real, x, 0.0), jnp.maximum(jnp.sum(real), 1)
    mean = jnp.sum(x) / count
    var = jnp.sum(jnp.where(real, jnp.square(x - mean), 0.0)) / jnp.maximum(count - bessel, 1)
    out = (x - mean) * jax.lax.rsqrt(var + 1e-8)
    return jnp.where(real, out if shift else out + mean, 0.0)


def _stats(rewards: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[P, G] -> rewards with holes filled by the mean, so that R - mean is 0 there; mean, count [P, 1]."""
    fine = jnp.isfinite(rewards)
    count = jnp.maximum(jnp.sum(fine, axis=-1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(fine, rewards, 0.0), axis=-1, keepdims=True) / count
    return jnp.where(fine, rewards, mean), mean, count


def centred(rewards: jax.Array) -> jax.Array:
    """[P, G] -> [P, G]."""
    r, mean, _ = _stats(rewards)
    return r - mean


def group(rewards: jax.Array) -> jax.Array:
    """[P, G] -> [P, G]; 0 for a group of equal rewards."""
    r, mean, count = _stats(rewards)
    std = jnp.sqrt(jnp.sum(jnp.square(r - mean), axis=-1, keepdims=True) / jnp.maximum(count - 1, 1))
    return (r - mean) / (std + 1e-4)


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """[P, G] -> [P, G]: n / (n - 1) (R - mean) for n given rewards; a single one has no baseline and gives 0."""
    r, mean, count = _stats(rewards)
    return (r - mean) * count / jnp.maximum(count - 1, 1)


def over_batch(rewards: jax.Array) -> jax.Array:
    """[P, G] -> [P, G]."""
    return group(rewards.reshape(1, -1)).reshape(rewards.shape)


GROUP: dict[str, Callable[[jax.Array], jax.Array]] = {
    "group": group,
    "centred": centred,
    "leave_one_out": leave_one_out,
    "global": over_batch,
}


def teaches(rewards: jax.Array) -> jax.Array:
    """DAPO's dynamic sampling (arXiv 2503.14476): bool [P], whether a group [P, G] has rewards that differ."""
    r, mean, _ = _stats(rewards)
    return jnp.max(jnp.abs(r - mean), axis=-1) > 1e-6 * (1 + jnp.abs(mean[..., 0]))


def overlong(length: jax.Array, longest: int, buffer: int) -> jax.Array:
    """DAPO's soft penalty of n tokens [...]: 0 up to longest - buffer, then linear, -1 from `longest` on."""
    return jnp.clip((longest - buffer - length) / buffer, -1.0, 0.0)
