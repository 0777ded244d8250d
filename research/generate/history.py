"""What has been said already changes what may be said: repetition penalty and no repeated n-grams.

Both look at prompt and continuation together, and at real tokens only: a pad is no token that was said.
"""

import jax
import jax.numpy as jnp


def penalised(logits: jax.Array, tokens: jax.Array, real: jax.Array, penalty: float) -> jax.Array:
    """CTRL's penalty (arXiv 1909.05858, section 4.1): the logits of tokens that are there already are divided by
    `penalty` where positive and multiplied by it where negative.

    logits [B, V], tokens int [B, S], real bool [B, S] -> [B, V].
    """
    said = marked(tokens, real, logits.shape[-1])
    return jnp.where(said, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def without_repeats(logits: jax.Array, tokens: jax.Array, real: jax.Array, end: jax.Array | int, n: int) -> jax.Array:
    """-inf where the token would complete an n-gram that is there already.

    tokens int [B, S], real bool [B, S]; `end` slots are filled, the same in all rows, the last of them real.
    """
    windows = tokens.shape[1] - n + 1
    if windows < 1:
        return logits
    same = jnp.ones((tokens.shape[0], windows), bool)
    for k in range(n - 1):  # the last n - 1 tokens against every place's
        last = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(end - n + 1 + k, 0), 1, axis=1)
        same &= (tokens[:, k : k + windows] == last) & real[:, k : k + windows]
    follows = tokens[:, n - 1 :]
    same &= real[:, n - 1 :] & (end >= n - 1) & (jnp.arange(windows) + n - 1 < end)
    return jnp.where(marked(follows, same, logits.shape[-1]), -jnp.inf, logits)


def marked(tokens: jax.Array, where: jax.Array, size: int) -> jax.Array:
    """bool [B, V]: the tokens [B, S] at places that are True."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], size), bool).at[rows, tokens].max(where)
