"""Beam search: the likeliest continuations, not drawn but searched for.

    out = search(model, variables, tokens, mask, beams=4, max_new=64, stop=(eos,), length_penalty=1.0)
    out.tokens[b, 0, : out.mask[b, 0].sum()]      # the best of row b

Each row has K beams, all of one prompt: the cache is copied K times after the prompt, and its rows follow the beams
they belong to. Of the 2K likeliest extensions those that end go to the finished ones, by log-probability over
length^penalty (arXiv 1609.08144, eq. 14, as `transformers` simplifies it), and the best K of the others live on. A row
is done when no living beam can beat its worst finished one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import FlagError
from research.generate import cache as caches
from research.peft import tree

PyTree = Any
NEVER = -1e30  # a score no beam has: -inf would give NaN where it is subtracted


class Beams(NamedTuple):
    """tokens, mask int [B, K, N], best first, the stop token included; logprobs fp32 [B, K, N] of the tokens; scores
    fp32 [B, K], their sum over length^penalty.
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    scores: jax.Array


class _State(NamedTuple):
    step: jax.Array
    alive: jax.Array  # [B, K, N] tokens
    each: jax.Array  # [B, K, N] their log-probabilities
    logprob: jax.Array  # [B, K] their sums
    done: Beams
    logits: jax.Array  # [B*K, V]
    cache: PyTree


def search(
    model: nn.Module,
    variables: PyTree,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    beams: int,
    max_new: int,
    stop: Sequence[int] = (),
    length_penalty: float = 1.0,
    pad: int = 0,
) -> Beams:
    """The K best continuations of each row that the search finds.

    Args:
        variables: realised. tokens, mask: int [B, T], padded on the left.
        beams: K. max_new: N, the most tokens. stop: ids that end one.
        length_penalty: above 0 long ones gain, below 0 short ones; 0 compares plain log-probabilities.
    Raises FlagError for beams or max_new below 1.
    """
    for name, value in (("beams", beams), ("max_new", max_new)):
        if value < 1:
            raise FlagError(f"{name}={value} is out of range: valid are whole numbers of at least 1.")
    rows, k = tokens.shape[0], beams
    ends = jnp.asarray(list(stop), jnp.int32)
    normal = lambda total, length: total / jnp.asarray(length, jnp.float32) ** length_penalty  # noqa: E731

    def extend(state: _State) -> _State:
        i, size = state.step, state.logits.shape[-1]
        each = jax.nn.log_softmax(state.logits.astype(jnp.float32)).reshape(rows, k, size)
        total, place = jax.lax.top_k((state.logprob[..., None] + each).reshape(rows, k * size), min(2 * k, k * size))
        source, token = place // size, (place % size).astype(jnp.int32)
        longer = _take(state.alive, source).at[:, :, i].set(token)
        own = _take(state.each, source).at[:, :, i].set(total - jnp.take_along_axis(state.logprob, source, axis=1))
        ended = jnp.isin(token, ends)

        # Only among the first K may one end: a later one would be kept though better ones live on.
        ends_here = ended & (jnp.arange(total.shape[1]) < k) & (total > NEVER / 2)
        new = jnp.where(ends_here, normal(total, i + 1), NEVER)
        length = jnp.broadcast_to((jnp.arange(max_new) <= i).astype(jnp.int32), longer.shape)
        done = _best(state.done, Beams(longer, length, own, new), k)

        logprob, chosen = jax.lax.top_k(jnp.where(ended, NEVER, total), k)
        source, token = (jnp.take_along_axis(x, chosen, axis=1) for x in (source, token))
        follow = (jnp.arange(rows)[:, None] * k + source).reshape(-1)
        cache = tree.map_with_path(lambda path, x: jnp.take(x, follow, axis=_rows(path, x)), state.cache)
        logits, cache = jax.lax.cond(
            i + 1 < max_new,
            lambda: caches.step(model, variables, cache, token.reshape(-1), max_new - i),
            lambda: (state.logits, cache),
        )
        return _State(i + 1, _take(longer, chosen), _take(own, chosen), logprob, done, logits, cache)

    def more(state: _State) -> jax.Array:
        worst = state.done.scores[:, -1]
        # What the best living beam could reach, as long or as short as the penalty would have it.
        length = jnp.where(length_penalty > 0, max_new, state.step)
        hope = normal(state.logprob[:, 0], jnp.maximum(length, 1))
        return (state.step < max_new) & jnp.any(hope > worst)

    logits, cache = caches.prefill(model, variables, tokens, mask, max_new)
    wide = tree.map_with_path(lambda path, x: jnp.repeat(x, k, axis=_rows(path, x)), cache)
    shape = (rows, k, max_new)
    zeros = jnp.zeros(shape, jnp.float32)
    nothing = Beams(jnp.full(shape, pad, jnp.int32), zeros.astype(jnp.int32), zeros, jnp.full((rows, k), NEVER))
    first = jnp.where(jnp.arange(k) == 0, 0.0, NEVER)  # all beams are one prompt: the others are no choice yet
    start, wide_logits = jnp.broadcast_to(first, (rows, k)), jnp.repeat(logits, k, axis=0)
    state = _State(jnp.asarray(0), nothing.tokens, zeros, start, nothing, wide_logits, wide)
    state = jax.lax.while_loop(more, extend, state)
    alive = jnp.broadcast_to((jnp.arange(max_new) < state.step).astype(jnp.int32), shape)
    scores = jnp.where(state.logprob > NEVER / 2, normal(state.logprob, state.step), NEVER)
    out = _best(state.done, Beams(state.alive, alive, state.each, scores), k)
    real = out.mask > 0
    return out._replace(tokens=jnp.where(real, out.tokens, pad), logprobs=jnp.where(real, out.logprobs, 0.0))


def _rows(path: str, leaf: jax.Array) -> int:
    """Which axis of a cache's leaf counts rows: keys and values [..., B, S, heads, K], all others [B, ...]."""
    return leaf.ndim - 4 if path.endswith(("keys", "values")) else 0


def _take(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """x [B, K, N] at chosen [B, J] -> [B, J, N]."""
    return jnp.take_along_axis(x, chosen[..., None], axis=1)


def _best(one: Beams, two: Beams, k: int) -> Beams:
    """The K best of both."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), one, two)
    scores, chosen = jax.lax.top_k(both.scores, k)
    return Beams(*(_take(x, chosen) for x in both[:3]), scores)
