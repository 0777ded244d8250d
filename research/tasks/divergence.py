"""Estimators of KL(policy || reference) from log-probabilities of the policy's own samples.

With d = log policy - log reference of a sampled token: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d
(http://joschu.net/blog/kl-approx.html). k1 and k3 have the KL as their mean, k2 is biased; k2 and
k3 are never negative.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def k1(logps: jax.Array, reference: jax.Array) -> jax.Array:
    """[...] -> [...] nats; single values may be negative."""
    return logps - reference


def k2(logps: jax.Array, reference: jax.Array) -> jax.Array:
    """[...] -> [...] nats; its gradient under samples of the policy is that of KL(policy || reference)."""
    return 0.5 * jnp.square(logps - reference)


def k3(logps: jax.Array, reference: jax.Array) -> jax.Array:
    """[...] -> [...] nats, 0 only where both agree."""
    d = logps - reference
    return jnp.expm1(-d) + d


def exact(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """KL over the whole vocabulary. logits, reference [..., V] -> [...] nats, fp32."""
    p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    q = jax.nn.log_softmax(reference.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


ESTIMATORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"k1": k1, "k2": k2, "k3": k3}
