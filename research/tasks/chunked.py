"""What a loss needs of the logits, without holding them: log-probabilities by chunks of tokens.

    value[n], extra[n] = fn(unembed(head, hidden[n], rng), labels[n])

One chunk's logits [chunk, V] exist at a time. Rows are independent, so where the head is frozen the gradient of each
row's own value comes out of the forward pass, [N, D], and the backward pass only scales it: the head multiplies twice a
step, as for the plain loss, and nothing is computed again. Where the head trains (tied, full, an adapter on it) the
backward pass goes over the chunks once more and sums the head's gradient.

Chunks take every (N / chunk)-th row: the rows' leading dimension stays whole, so a batch that is sharded stays so.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.dot import cotangent, dot, is_primal
from research.peft import tree

PyTree = Any
Unembed = Callable[[PyTree, jax.Array, jax.Array | None], jax.Array]


class Rows(NamedTuple):
    """Each [N]: log p(label) in nats, differentiable; the distribution's entropy in nats and whether the label is the
    likeliest (0 or 1), both without gradient.
    """

    logprob: jax.Array
    entropy: jax.Array
    correct: jax.Array


def kernel_unembed(kernel: Any, x: jax.Array, rng: jax.Array | None) -> jax.Array:
    """The `unembed` whose head is a kernel [D, V], an array or quantised. x [n, D] -> [n, V]."""
    return dot(x, kernel)


def model_unembed(model: nn.Module) -> Unembed:
    """The `unembed` of a model, whose head is `model_head(variables)`."""

    def unembed(head: PyTree, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return model.apply(head, x, method="unembed", rngs={} if rng is None else {"dropout": rng})

    return unembed


def model_head(variables: dict, names: tuple[str, ...] = ("lm_head",), table: str = "embed") -> dict:
    """What `model.unembed` reads of the variables: the output projection with its nodes, and where there is none the
    token table. The rest must stay out: one leaf that trains makes the head a trained one.
    """
    tied = not any(name in variables["params"] for name in names)
    kept = {"params": (*names, table) if tied else names, "peft": names, "shared": names}
    return {c: {k: v for k, v in variables[c].items() if k in kept[c]} for c in kept if c in variables}


def chunked_logprobs(
    unembed: Unembed,
    head: PyTree,
    hidden: jax.Array,
    labels: jax.Array,
    chunk: int = 1024,
    softcap: float | None = None,
    rng: jax.Array | None = None,
) -> Rows:
    """hidden [N, D], labels [N] int -> Rows; gradients reach `hidden` and what trains of `head`.

    softcap: logits become softcap * tanh(logits / softcap). rng: for dropout in the head, folded with the chunk.
    """
    count, chunk = hidden.shape[0], min(chunk, hidden.shape[0])
    chunks = -(-count // chunk)

    def split(x: jax.Array) -> jax.Array:  # [N, ...] -> [chunks, chunk, ...]
        x = jnp.pad(x, [(0, chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunk, chunks, *x.shape[1:]).swapaxes(0, 1)

    rngs = None if rng is None else jax.random.key_data(jax.random.split(rng, chunks))
    each = _rows(partial(_logprobs, softcap), unembed, head, split(hidden), split(labels), rngs)
    logprob, (entropy, correct) = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1)[:count], each)
    return Rows(logprob, entropy, correct)


def chunked_nats(
    unembed: Unembed,
    head: PyTree,
    hidden: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    chunk: int = 1024,
    softcap: float | None = None,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (sum of weight * cross-entropy in nats [], sum of weight * correct []). weight [N]; the rest as above."""
    rows = chunked_logprobs(unembed, head, hidden, labels, chunk, softcap, rng)
    return -jnp.sum(rows.logprob * weight), jnp.sum(rows.correct * weight)


def _logprobs(softcap: float | None, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, tuple]:
    """logits [n, V] -> log p [n], and (entropy [n], correct [n])."""
    logits = logits.astype(jnp.float32)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    logp = jax.lax.stop_gradient(logits - total[:, None])
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return picked - total, (entropy, (jnp.argmax(logp, axis=-1) == labels).astype(jnp.float32))


def _one(fn: Callable, unembed: Unembed, head: PyTree, x: jax.Array, labels: jax.Array, rng: Any) -> tuple:
    rng = None if rng is None else jax.random.wrap_key_data(rng)
    return fn(unembed(head, x, rng), labels)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(fn: Callable, unembed: Unembed, head: PyTree, x: jax.Array, labels: jax.Array, rngs: Any) -> tuple:
    """x [C, n, D], labels [C, n] -> (values [C, n], extras)."""
    return jax.lax.map(lambda each: _one(fn, unembed, head, *each), (x, labels, rngs))


def _rows_fwd(fn: Callable, unembed: Unembed, head: Any, x: Any, labels: Any, rngs: Any) -> tuple:
    trained, frozen = (
        jax.tree.map(lambda p, keep=keep: p.value if p.perturbed == keep else None, head, is_leaf=is_primal)
        for keep in (True, False)
    )
    x, labels, rngs = (jax.tree.map(lambda p: p.value, t, is_leaf=is_primal) for t in (x, labels, rngs))
    if jax.tree.leaves(trained):
        out = _rows(fn, unembed, tree.combine(trained, frozen), x, labels, rngs)
        return out, (trained, frozen, x, labels, rngs, None)

    def one(each: tuple) -> tuple:
        x, labels, rng = each
        value, pull, extra = jax.vjp(lambda x: _one(fn, unembed, frozen, x, labels, rng), x, has_aux=True)
        return (value, extra), pull(jnp.ones_like(value))[0]

    out, slope = jax.lax.map(one, (x, labels, rngs))
    return out, (trained, None, None, None, None, slope)


def _rows_bwd(fn: Callable, unembed: Unembed, residuals: tuple, cotangents: tuple) -> tuple:
    trained, frozen, x, labels, rngs, slope = residuals
    dy = cotangent(cotangents[0])
    if slope is not None:
        return None, (dy[..., None] * slope).astype(slope.dtype), None, None

    def one(total: PyTree, each: tuple) -> tuple:
        x, labels, rng, dy = each
        value = lambda trained, x: _one(fn, unembed, tree.combine(trained, frozen), x, labels, rng)[0]  # noqa: E731
        dhead, dx = jax.vjp(value, trained, x)[1](dy)
        return jax.tree.map(jnp.add, total, dhead), dx

    dhead, dx = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, trained), (x, labels, rngs, dy))
    return dhead, dx, None, None


_rows.defvjp(_rows_fwd, _rows_bwd, symbolic_zeros=True)
