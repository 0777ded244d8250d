"""Generation: one prefill and one decoding loop, jitted, for every method and family.

    out = generate(model, variables, tokens, mask, rng, max_new=64, stop=(eos,))
    out.tokens[b, : out.mask[b].sum()]     # the stop token included

Adapters work as in training, since the model is applied as in training: `variables` hold them, realised. What is right
does not depend on padding or neighbours: masks come from lengths, never from pad ids, and each row has its own key.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import DataError, FlagError
from research.generate import cache as caches
from research.generate.sampling import GREEDY, Sampling
from research.tasks.loss import cross_entropy

PyTree = Any


class Generated(NamedTuple):
    """tokens int [B, N]; mask int [B, N], 1 up to and with the stop token; logprobs fp32 [B, N] of the tokens under the
    model itself, at temperature 1 and unfiltered, 0 where the mask is.
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array


def generate(
    model: nn.Module,
    variables: PyTree,
    tokens: jax.Array,
    mask: jax.Array,
    rng: jax.Array,
    *,
    max_new: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
    pad: int = 0,
) -> Generated:
    """Continues each row.

    Args:
        variables: realised (`peft.realised`).
        tokens, mask: int [B, T], padded on the left.
        rng: row b draws its token i with fold_in(fold_in(rng, b), i).
        max_new: N, the most tokens a row gets. stop: ids that end a row. pad: what stands after the end.
    Raises FlagError for max_new below 1; DataError for a row that does not end in a real token (outside `jit`).
    """
    if max_new < 1:
        raise FlagError(f"max_new={max_new} is out of range: valid are whole numbers of at least 1.")
    if not isinstance(mask, jax.core.Tracer) and not np.asarray(mask)[:, -1].all():
        row = int(np.argmin(np.asarray(mask)[:, -1]))
        raise DataError(f"row {row} does not end in a real token: prompts are padded on the left, and none is empty.")
    rows = tokens.shape[0]
    keys = jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(rows))
    ends = jnp.asarray(list(stop), jnp.int32)

    def pick(
        i: jax.Array, logits: jax.Array, done: jax.Array, out: Generated
    ) -> tuple[jax.Array, jax.Array, Generated]:
        said = jnp.concatenate([tokens, out.tokens], axis=1), jnp.concatenate([mask, out.mask], axis=1) > 0
        allowed = sampling.constrained(logits, *said, tokens.shape[1] + i)
        token = sampling.draw(jax.vmap(lambda k: jax.random.fold_in(k, i))(keys), allowed)
        logprob = -cross_entropy(logits, token)
        token = jnp.where(done, pad, token)
        new = Generated(token, (~done).astype(jnp.int32), jnp.where(done, 0.0, logprob))
        out = jax.tree.map(lambda x, y: x.at[:, i].set(y), out, new)
        return token, done | jnp.isin(token, ends), out

    def more(state: tuple) -> jax.Array:
        i, _, done, _, _ = state
        return (i < max_new) & ~jnp.all(done)

    def next_token(state: tuple) -> tuple:
        i, token, done, cache, out = state
        logits, cache = caches.step(model, variables, cache, token, max_new - i + 1)
        token, done, out = pick(i, logits, done, out)
        return i + 1, token, done, cache, out

    logits, cache = caches.prefill(model, variables, tokens, mask, max_new)
    shape = (rows, max_new)
    out = Generated(jnp.full(shape, pad, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    token, done, out = pick(jnp.asarray(0), logits, jnp.zeros(rows, bool), out)
    return jax.lax.while_loop(more, next_token, (jnp.asarray(1), token, done, cache, out))[-1]
