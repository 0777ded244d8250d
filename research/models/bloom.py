"""BLOOM (arXiv 2211.05100): a GPT-2 without positions, whose scores fall with the distance (ALiBi, arXiv 2108.12409).

    embed/tokens/embedding, embed/norm
    layers/attn_norm, layers/attn/{q,k,v,o}, layers/mlp_norm, layers/mlp/{up,down}
    norm, lm_head

Leaves under `layers` have a leading axis L where the stack is scanned; a tied model (all presets) has no lm_head. Their
files fuse q, k and v of each head in one tensor; here they are three, each a site of its own.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models.decoder import Decoder, within
from research.nn.attention import Attention
from research.nn.embed import Embed
from research.nn.mlp import Mlp
from research.nn.norm import LayerNorm
from research.nn.param import dropout, training_rng
from research.nn.sites import Prompt, Residual


@dataclass(frozen=True)
class BloomConfig:
    """Shapes and options. max_positions: the longest rows of its training, no limit of the function."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 2048
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    family: str = "bloom"
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"


def _config(d: int, layers: int, heads: int, vocab_size: int = 250880) -> BloomConfig:
    return BloomConfig(vocab_size, d, layers, heads, 4 * d)


PRESETS = {
    "bloom-560m": _config(1024, 24, 16),
    "bloom-1b1": _config(1536, 24, 16),
    "bloom-1b7": _config(2048, 24, 16),
    "bloom-3b": _config(2560, 30, 32),
    "bloom-7b1": _config(4096, 30, 32),
    "bloom": _config(14336, 70, 112),
    "bloom-1b4-zh": _config(2048, 24, 16, vocab_size=46145),  # Langboat's: BLOOM-1b7 with Chinese tokens only
}


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)). keys: the positions of the keys [B, S]."""

    config: BloomConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, keys: jax.Array) -> jax.Array:
        c = self.config
        attn = Attention(
            c.num_heads, c.num_heads, c.hidden_size // c.num_heads, qkv_bias=True, out_bias=True, alibi=True,
            dropout=c.attention_dropout, dtype=c.dtype, param_dtype=c.param_dtype, name="attn",
        )  # fmt: skip
        attn_norm = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="attn_norm")
        h = attn_norm(x)
        y = dropout(attn(h, mask, None, attn_norm, positions=keys), c.dropout, training_rng(self))
        x = x + Residual(name="attn_residual")(x, h, y)
        h = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="mlp_norm")(x)
        mlp = Mlp(c.intermediate_size, "gelu_tanh", 0.0, c.dtype, c.param_dtype, name="mlp")
        y = dropout(mlp(h), c.dropout, training_rng(self))
        x = x + Residual(name="mlp_residual")(x, h, y)
        return nn.with_logical_constraint(x, ("batch", "length", None))


class Embeddings(nn.Module):
    """The token table, normed; virtual tokens come in at the table's level, before the norm."""

    config: BloomConfig

    def setup(self) -> None:
        c = self.config
        self.tokens = Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype)
        self.norm = LayerNorm(c.norm_eps, param_dtype=c.param_dtype)
        self.prompt = Prompt()

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, segments: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, tuple | None]:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) if segments is None else within(segments)
        x, slots, positions = self.prompt(self.tokens(tokens), mask, positions)
        return self.norm(x), slots, positions, self.prompt.past()

    def attend(self, x: jax.Array) -> jax.Array:
        return self.tokens.attend(x)


class Bloom(Decoder):
    """The decoder, for rows of any length."""

    config: BloomConfig
    embeddings = Embeddings
    block = Block
    last_norm = LayerNorm

    def given(self, positions: jax.Array, past: tuple[jax.Array, jax.Array] | None) -> tuple:
        return (positions if past is None else jnp.concatenate([past[1], positions], axis=1),)
