"""BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692): post-LN encoders with learnt positions.

    embed/{tokens,positions,types}/embedding, embed/norm
    layers/attn/{q,k,v,o}, layers/attn_norm, layers/mlp/{up,down}, layers/mlp_norm
    pooler

Leaves under `layers` have a leading axis L where the stack is scanned; RoBERTa's presets have no pooler.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import ModelError
from research.nn.attention import Attention
from research.nn.embed import Embed
from research.nn.layers import apply_layers
from research.nn.linear import Linear
from research.nn.mlp import Mlp
from research.nn.norm import LayerNorm
from research.nn.param import dropout, training_rng
from research.nn.sites import Outputs, Prompt, Residual


@dataclass(frozen=True)
class BertConfig:
    """Shapes and options.

    `position_offset` is RoBERTa's 2; `dtype` is the compute dtype, `param_dtype` the parameters'.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    position_offset: int = 0
    pooler: bool = True
    norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    family: str = "bert"
    pad_token_id: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"


_ROBERTA = {
    "vocab_size": 50265, "max_positions": 514, "type_vocab_size": 1, "position_offset": 2, "pooler": False,
    "norm_eps": 1e-5, "family": "roberta", "pad_token_id": 1,
}  # fmt: skip
_LARGE = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096}

PRESETS = {
    "bert-tiny": BertConfig(hidden_size=128, num_layers=2, num_heads=2, intermediate_size=512),
    "bert-base": BertConfig(),
    "bert-base-cased": BertConfig(vocab_size=28996),
    "bert-large": BertConfig(**_LARGE),
    "bert-large-cased": BertConfig(vocab_size=28996, **_LARGE),
    "roberta-base": BertConfig(**_ROBERTA),
    "roberta-large": BertConfig(**_ROBERTA, **_LARGE),
    "minilm-l6": BertConfig(hidden_size=384, num_layers=6, intermediate_size=1536),
}


class Embeddings(nn.Module):
    """Token, position and type tables, summed and normed; virtual tokens come in at the token table's level."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array, types: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        c = self.config
        t = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        x = Embed(c.vocab_size, c.hidden_size, name="tokens", **t)(tokens)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        x, mask, positions = Prompt(name="prompt")(x, mask, positions)
        if x.shape[1] > (most := c.max_positions - c.position_offset):
            raise ModelError(f"{x.shape[1]} tokens are more than the model's {most} positions: cut them.")
        types = (
            jnp.zeros_like(positions) if types is None else jnp.pad(types, ((0, 0), (x.shape[1] - types.shape[1], 0)))
        )
        x += Embed(c.max_positions, c.hidden_size, ("position", "embed"), name="positions", **t)(
            positions + c.position_offset
        )
        x += Embed(c.type_vocab_size, c.hidden_size, (None, "embed"), name="types", **t)(types)
        x = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="norm")(x)
        return dropout(x, c.dropout, training_rng(self)), mask


class Block(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x))."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        attn = Attention(
            c.num_heads, c.num_heads, c.hidden_size // c.num_heads, qkv_bias=True, out_bias=True,
            dropout=c.attention_dropout, dtype=c.dtype, param_dtype=c.param_dtype, name="attn",
        )  # fmt: skip
        attn_norm = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="attn_norm")
        mlp = Mlp(c.intermediate_size, c.activation, 0.0, c.dtype, c.param_dtype, name="mlp")
        mlp_norm = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="mlp_norm")
        y = dropout(attn(x, mask), c.dropout, training_rng(self))
        x = attn_norm(x + Residual(name="attn_residual")(x, x, y, attn_norm))
        y = dropout(mlp(x), c.dropout, training_rng(self))
        x = mlp_norm(x + Residual(name="mlp_residual")(x, x, y, mlp_norm))
        return nn.with_logical_constraint(x, ("batch", "length", None))


class Bert(nn.Module):
    """The encoder. Applied with a `dropout` rng it trains; without, it evaluates."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        self.embed = Embeddings(c)
        self.layers = Block(c) if c.scan else [Block(c) for _ in range(c.num_layers)]
        self.outputs = Outputs(c.num_layers)
        if c.pooler:
            self.pooler = Linear(c.hidden_size, ("embed", None), dtype=c.dtype, param_dtype=c.param_dtype)

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None) -> jax.Array:
        """tokens, mask (1 real, 0 pad), types int [B, T] -> hidden [B, T, D].

        Positions count real tokens, so that padding on either side changes no real token's result. ModelError for more
        tokens than positions: a table would give NaN for what it does not have.
        """
        mask = jnp.ones_like(tokens) if mask is None else mask
        embedded, slots = self.embed(tokens, mask, types)
        seen = slots[:, None, :].astype(bool)
        x, layers = apply_layers(self.layers, self.config, embedded, seen, collect=self.outputs.occupied)
        x = self.outputs(x, layers, embedded, seen)[:, -tokens.shape[1] :]
        if self.config.pooler and self.is_initializing():
            self.pooler(x[:, 0])
        return x

    def features(self, tokens: jax.Array, mask: jax.Array, types: jax.Array | None = None) -> jax.Array:
        """[B, D] for a task head: the first real token, through tanh(pooler) where the model has one."""
        x = self(tokens, mask, types)
        x = jnp.take_along_axis(x, jnp.argmax(mask, axis=1)[:, None, None], axis=1)[:, 0]
        return jnp.tanh(self.pooler(x)) if self.config.pooler else x
