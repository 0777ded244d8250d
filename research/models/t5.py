"""T5 (arXiv 1910.10683) and T5 1.1 (arXiv 2002.05202), encoder-decoders with relative positions.

    embed/tokens/embedding
    encoder/relative/embedding, encoder/layers/{attn_norm, attn, mlp_norm, mlp}, encoder/norm
    decoder, which has layers/{cross_attn_norm, cross_attn} too
    lm_head

Scores are not scaled, projections have no biases, and each stack has one table of position biases, which all its
layers add. A virtual key has no position, so its bias is 0. T5 1.1 has a gated GELU and an output of its own, T5 a ReLU
and its token table as output, of states scaled by D^-0.5.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models.decoder import causal
from research.nn.attention import Attention
from research.nn.embed import Embed, Tied
from research.nn.layers import apply_layers
from research.nn.linear import Linear
from research.nn.mlp import GatedMlp, Mlp
from research.nn.norm import RMSNorm
from research.nn.param import dropout, training_rng
from research.nn.sites import Prompt, Residual, recall, remember


@dataclass(frozen=True)
class T5Config:
    """Shapes and options.

    buckets: of relative distances, of which `max_distance` and more share the last. num_layers: the encoder's.
    start_token_id: what the decoder begins with. max_positions bounds nothing in T5; scripts cut their rows to it.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    gated: bool = True
    tie_embeddings: bool = False
    scale_outputs: bool = False
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.1
    start_token_id: int = 0
    max_positions: int = 512
    family: str = "t5"
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"

    @property
    def activation(self) -> str:
        return "gelu_tanh" if self.gated else "relu"


def _config(d: int, layers: int, heads: int, ffn: int, **more) -> T5Config:
    sizes = {"vocab_size": 32128, "head_dim": 64, "num_decoder_layers": layers} | more
    return T5Config(hidden_size=d, num_layers=layers, num_heads=heads, intermediate_size=ffn, **sizes)


_FIRST = {"gated": False, "tie_embeddings": True, "scale_outputs": True}

PRESETS = {
    "t5.1.1-small": _config(512, 8, 6, 1024),
    "t5.1.1-base": _config(768, 12, 12, 2048),
    "t5.1.1-large": _config(1024, 24, 16, 2816),
    "t5.1.1-xl": _config(2048, 24, 32, 5120),
    "t5.1.1-xxl": _config(4096, 24, 64, 10240),
    "t5-small": _config(512, 6, 8, 2048, **_FIRST),
    "t5-base": _config(768, 12, 12, 3072, **_FIRST),
    "t5-large": _config(1024, 24, 16, 4096, **_FIRST),
    "t5-3b": _config(1024, 24, 32, 16384, head_dim=128, **_FIRST),
    "t5-11b": _config(1024, 24, 128, 65536, head_dim=128, **_FIRST),
}


class Block(nn.Module):
    """x = x + attention(norm(x)); in a decoder x = x + attention(norm(x), context); x = x + mlp(norm(x))."""

    config: T5Config
    decoder: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> jax.Array:
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        heads = {"scale": 1.0, "dropout": c.dropout, "keep": self.decoder} | types

        def sublayer(
            x: jax.Array, name: str, layer: nn.Module, *args: jax.Array, **more: jax.Array | None
        ) -> jax.Array:
            norm = RMSNorm(c.norm_eps, param_dtype=c.param_dtype, name=f"{name}_norm")
            h = norm(x)
            y = layer(h, *args, norm=norm, **more) if name != "mlp" else layer(h)
            return x + Residual(name=f"{name}_residual")(x, h, dropout(y, c.dropout, training_rng(self)))

        attn = Attention(c.num_heads, c.num_heads, c.head_dim, name="attn", **heads)
        x = sublayer(x, "attn", attn, mask, bias=bias)
        if self.decoder:
            cross = Attention(c.num_heads, c.num_heads, c.head_dim, cross=True, name="cross_attn", **heads)
            x = sublayer(x, "cross_attn", cross, context_mask, context=context)
        if c.gated:
            mlp = GatedMlp(c.intermediate_size, c.activation, c.dropout, name="mlp", **types)
        else:
            mlp = Mlp(c.intermediate_size, c.activation, c.dropout, use_bias=False, name="mlp", **types)
        return nn.with_logical_constraint(sublayer(x, "mlp", mlp), ("batch", "length", None))


class Stack(nn.Module):
    """The encoder's or the decoder's blocks, their table of position biases and the last norm."""

    config: T5Config
    decoder: bool

    def setup(self) -> None:
        c = self.config
        self.relative = Embed(c.buckets, c.num_heads, (None, "heads"), "float32", c.param_dtype)
        count = c.num_decoder_layers if self.decoder else c.num_layers
        self.layers = Block(c, self.decoder) if c.scan else [Block(c, self.decoder) for _ in range(count)]
        self.norm = RMSNorm(c.norm_eps, param_dtype=c.param_dtype)

    def __call__(
        self, x: jax.Array, mask: jax.Array, queries: jax.Array, keys: jax.Array, *context: jax.Array | None
    ) -> jax.Array:
        """x [B, T, D], mask bool [B, T or 1, S], positions of queries [B, T] and keys [B, S] -> [B, T, D]."""
        c = self.config
        places = bucket(keys[:, None, :] - queries[:, :, None], c.buckets, c.max_distance, two_sided=not self.decoder)
        bias = self.relative(places).transpose(0, 3, 1, 2)
        depth = c.num_decoder_layers if self.decoder else c.num_layers
        x, _ = apply_layers(
            self.layers, c, dropout(x, c.dropout, training_rng(self)), mask, bias, *context, depth=depth
        )
        return dropout(self.norm(x), c.dropout, training_rng(self))


class T5(nn.Module):
    """The encoder-decoder. `__call__` gives the decoder's hidden states, `logits` the next-token logits."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        self.embed = Embeddings(c)
        self.encoder, self.decoder = Stack(c, decoder=False), Stack(c, decoder=True)
        head = Linear(c.vocab_size, ("embed", "vocab"), use_bias=False, **types)
        self.lm_head = Tied() if c.tie_embeddings else head

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        targets: jax.Array | None = None,
        target_mask: jax.Array | None = None,
    ) -> jax.Array:
        """tokens, mask int [B, T] of the encoder; targets, target_mask int [B, T'] of the decoder, as it reads them:
        shifted right, the start token first, which is all where none are given -> hidden [B, T', D].

        With collection `cache` tokens and mask are the decoder's, and go on where it ends.
        """
        mask = jnp.ones_like(tokens) if mask is None else mask
        context, seen = None, recall(self, "context_mask")
        if seen is None:
            x, slots, positions = self.embed(tokens, mask)
            seen = slots[:, None, :].astype(bool)
            context = self.encoder(x, seen, positions, positions)
            tokens = jnp.full((tokens.shape[0], 1), self.config.start_token_id) if targets is None else targets
            mask = jnp.ones_like(tokens) if target_mask is None else target_mask
        remember(self, "context_mask", seen)
        y, slots, positions, past = self.embed.decoder(tokens, mask)
        keys = positions if past is None else jnp.concatenate([past[1], positions], axis=1)
        y = self.decoder(y, causal(slots, positions, past=past), positions, keys, context, seen)
        if self.is_initializing():
            self.unembed(y[:, :1])
        return y

    def unembed(self, x: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V] fp32."""
        c = self.config
        x = x * c.hidden_size**-0.5 if c.scale_outputs else x
        return self.lm_head(x, self.embed.attend(x)) if c.tie_embeddings else self.lm_head(x).astype(jnp.float32)

    def logits(self, *args: jax.Array) -> jax.Array:
        """As `__call__` -> logits [B, T', V] fp32."""
        return self.unembed(self(*args))

    def features(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, D] for a task head: the decoder's state at the start token, which has seen the whole sequence."""
        return self(tokens, mask)[:, 0]


class Embeddings(nn.Module):
    """The token table of both stacks; virtual tokens come before the encoder's sequence."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.tokens = Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype)
        self.prompt, self.targets = Prompt(keep=False), Prompt(virtual=False)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.prompt(self.tokens(tokens), mask, _positions(mask))

    def decoder(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, tuple | None]:
        return (*self.targets(self.tokens(tokens), mask, _positions(mask)), self.targets.past())

    def attend(self, x: jax.Array) -> jax.Array:
        return self.tokens.attend(x)


def _positions(mask: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def bucket(distance: jax.Array, buckets: int, most: int, two_sided: bool) -> jax.Array:
    """distance (key minus query) int [...] -> bucket int [...]: one each for the nearest half of them, and then
    logarithmically wider ones up to `most`. Two-sided, keys behind the query have one half and keys before it the
    other.
    """
    first = jnp.zeros_like(distance)
    if two_sided:
        buckets //= 2
        first, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(most / exact) * (buckets - exact)
    return first + jnp.where(distance < exact, distance, jnp.minimum(exact + far.astype(jnp.int32), buckets - 1))
