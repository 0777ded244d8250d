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

from research.models.gpt2 import Gpt2
from research.models.llama import causal, together, within
from research.nn.attention import Attention
from research.nn.embed import Embed, Tied
from research.nn.layers import apply_layers
from research.nn.linear import Linear
from research.nn.mlp import Mlp
from research.nn.norm import LayerNorm
from research.nn.param import dropout, training_rng
from research.nn.sites import Outputs, Prompt, Residual


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


class Bloom(Gpt2):
    """The decoder: `logits`, `unembed` and `features` are GPT-2's."""

    config: BloomConfig

    def setup(self) -> None:
        c = self.config
        self.embed = Embeddings(c)
        self.layers = Block(c) if c.scan else [Block(c) for _ in range(c.num_layers)]
        self.outputs = Outputs(c.num_layers)
        self.norm = LayerNorm(c.norm_eps, param_dtype=c.param_dtype)
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        head = Linear(c.vocab_size, ("embed", "vocab"), use_bias=False, **types)
        self.lm_head = Tied() if c.tie_embeddings else head

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """As `Gpt2`, for rows of any length."""
        mask = jnp.ones_like(tokens) if mask is None else mask
        embedded, slots, positions, past = self.embed(tokens, mask, segments)
        seen = causal(slots, positions, None, past)
        if segments is not None:
            seen &= together(segments, slots.shape[1] - tokens.shape[1])
        keys = positions if past is None else jnp.concatenate([past[1], positions], axis=1)
        x, layers = apply_layers(self.layers, self.config, embedded, seen, keys, collect=self.outputs.occupied)
        x = self.norm(self.outputs(x, layers, embedded, seen)[:, -tokens.shape[1] :])
        if self.is_initializing():
            self.unembed(x[:, :1])
        return x
