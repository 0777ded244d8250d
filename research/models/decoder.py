"""What all decoders are: embeddings, a stack of blocks, a norm, an output. A family says what its blocks are, and what
they get besides the stream and its mask.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.embed import Tied
from research.nn.kernels import Sight
from research.nn.layers import apply_layers
from research.nn.linear import Linear
from research.nn.sites import Outputs


class Decoder(nn.Module):
    """`__call__` gives hidden states, `logits` the next-token logits. Applied with a `dropout` rng it trains; without,
    it evaluates.
    """

    config: Any
    embeddings: ClassVar[type[nn.Module]]
    block: ClassVar[type[nn.Module]]
    last_norm: ClassVar[type[nn.Module]]

    def setup(self) -> None:
        c = self.config
        self.embed = self.embeddings(c)
        self.layers = self.block(c) if c.scan else [self.block(c) for _ in range(c.num_layers)]
        self.outputs = Outputs(c.num_layers)
        self.norm = self.last_norm(c.norm_eps, param_dtype=c.param_dtype)
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        head = Linear(c.vocab_size, ("embed", "vocab"), use_bias=False, **types)
        self.lm_head = Tied() if c.tie_embeddings else head

    def given(self, positions: jax.Array, past: tuple[jax.Array, jax.Array] | None) -> tuple:
        """What each block gets after the stream and its mask: of positions [B, T], and mask and positions [B, N] of
        the tokens in the cache.
        """
        return ()

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """tokens, mask (1 real, 0 pad) int [B, T] -> hidden after the last norm [B, T, D].

        segments int [B, T], where several documents share a row: 1, 2, ... and 0 for padding. Each is then computed as
        if it were alone; virtual tokens and prefixes stand before every one.

        Positions count real tokens, so that padding on either side changes no real token's result. With collection
        `cache` the tokens go on where it ends.
        """
        c = self.config
        mask = jnp.ones_like(tokens) if mask is None else mask
        embedded, slots, positions, past = self.embed(tokens, mask, segments)
        seen = causal(slots, positions, getattr(c, "sliding_window", None), past)
        if segments is not None:
            seen &= together(segments, slots.shape[1] - tokens.shape[1])
        more = self.given(positions, past)
        seen_by = self.sight(seen, slots, segments, slots.shape[1] - tokens.shape[1]) if past is None else seen
        x, layers = apply_layers(self.layers, c, embedded, seen_by, *more, collect=self.outputs.occupied)
        x = self.norm(self.outputs(x, layers, embedded, seen)[:, -tokens.shape[1] :])
        if self.is_initializing():
            self.unembed(x[:, :1])
        return x

    def sight(self, seen: jax.Array, slots: jax.Array, segments: jax.Array | None, virtual: int) -> jax.Array | Sight:
        """seen, with what it was made from where a kernel wants that and it is the whole truth."""
        window = getattr(self.config, "sliding_window", None)
        # Of virtual tokens every document is, and what a window counts from them depends on the padding.
        if getattr(self.config, "kernel", "xla") != "splash" or (virtual and (segments is not None or window)):
            return seen
        return Sight(seen, slots if segments is None else segments, window, packed=segments is not None)

    def unembed(self, x: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V] fp32."""
        tied = self.config.tie_embeddings
        return self.lm_head(x, self.embed.attend(x)) if tied else self.lm_head(x).astype(jnp.float32)

    def logits(self, tokens: jax.Array, mask: jax.Array | None = None, segments: jax.Array | None = None) -> jax.Array:
        """tokens [B, T] -> logits [B, T, V] fp32."""
        return self.unembed(self(tokens, mask, segments))

    def features(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, D] for a task head: the last real token, which has seen the whole sequence."""
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(self(tokens, mask), last[:, None, None], axis=1)[:, 0]


def within(segments: jax.Array) -> jax.Array:
    """segments [B, T] -> the position of each token in its own segment [B, T]."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(new, index, 0), axis=1)


def together(segments: jax.Array, virtual: int) -> jax.Array:
    """segments [B, T] -> bool [B, P + T, P + T]: keys of the query's own segment, and the P virtual tokens in front."""
    segments = jnp.pad(segments, ((0, 0), (virtual, 0)), constant_values=-1)
    return (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == -1)


def causal(
    mask: jax.Array,
    positions: jax.Array,
    window: int | None = None,
    past: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """mask, positions [B, T] -> bool [B, T, T]: real keys at or before the query, and within its window.

    past: mask and positions [B, N] of earlier tokens; then [B, T, N + T].
    """
    t = mask.shape[1]
    allowed, keys = jnp.tril(jnp.ones((t, t), bool)) & mask[:, None, :].astype(bool), positions
    if past is not None:
        before = jnp.broadcast_to(past[0][:, None, :].astype(bool), (mask.shape[0], t, past[0].shape[1]))
        allowed, keys = jnp.concatenate([before, allowed], axis=-1), jnp.concatenate([past[1], positions], axis=1)
    if window is not None:
        allowed &= positions[:, :, None] - keys[:, None, :] < window
    return allowed
