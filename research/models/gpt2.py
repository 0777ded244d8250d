"""GPT-2 (Radford et al. 2019) and GPT-3 (arXiv 2005.14165): pre-LN decoders with learnt positions.

    embed/{tokens,positions}/embedding
    layers/attn_norm, layers/attn/{q,k,v,o}, layers/mlp_norm, layers/mlp/{up,down}
    norm, lm_head

Leaves under `layers` have a leading axis L where the stack is scanned; a tied model (all presets) has no lm_head. Their
files fuse q, k and v in one tensor; here they are three, each a site of its own. GPT-3's sizes are for shapes and
counts: its attention alternates dense and sparse layers, here all are dense.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import ModelError
from research.models.decoder import Decoder, within
from research.nn.attention import Attention
from research.nn.embed import Embed
from research.nn.mlp import Mlp
from research.nn.norm import LayerNorm
from research.nn.param import dropout, training_rng
from research.nn.sites import Prompt, Residual


@dataclass(frozen=True)
class Gpt2Config:
    """Shapes and options. dropout: of the embeddings and of what each sublayer adds to the stream."""

    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 1024
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    tie_embeddings: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1
    family: str = "gpt2"
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    kernel: str = "xla"


def _config(d: int, layers: int, heads: int, **more) -> Gpt2Config:
    return Gpt2Config(hidden_size=d, num_layers=layers, num_heads=heads, intermediate_size=4 * d, **more)


_GPT3 = {"max_positions": 2048, "dropout": 0.0, "attention_dropout": 0.0}

# Of GPT-3's table 2.1, XL has 24 heads of 128 on a width of 2048, and 13B a width of 5140: neither divides, 16 and 5120
# do.
PRESETS = {
    "gpt2": _config(768, 12, 12),
    "gpt2-medium": _config(1024, 24, 16),
    "gpt2-large": _config(1280, 36, 20),
    "gpt2-xl": _config(1600, 48, 25),
    "gpt3-small": _config(768, 12, 12, **_GPT3),
    "gpt3-medium": _config(1024, 24, 16, **_GPT3),
    "gpt3-large": _config(1536, 24, 16, **_GPT3),
    "gpt3-xl": _config(2048, 24, 16, **_GPT3),
    "gpt3-2.7b": _config(2560, 32, 32, **_GPT3),
    "gpt3-6.7b": _config(4096, 32, 32, **_GPT3),
    "gpt3-13b": _config(5120, 40, 40, **_GPT3),
    "gpt3": _config(12288, 96, 96, **_GPT3),
}


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x))."""

    config: Gpt2Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        attn = Attention(
            c.num_heads, c.num_heads, c.hidden_size // c.num_heads, qkv_bias=True, out_bias=True,
            dropout=c.attention_dropout, kernel=c.kernel, dtype=c.dtype, param_dtype=c.param_dtype, name="attn",
        )  # fmt: skip
        attn_norm = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="attn_norm")
        h = attn_norm(x)
        y = dropout(attn(h, mask, None, attn_norm), c.dropout, training_rng(self))
        x = x + Residual(name="attn_residual")(x, h, y)
        h = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="mlp_norm")(x)
        mlp = Mlp(c.intermediate_size, c.activation, 0.0, c.dtype, c.param_dtype, name="mlp")
        y = dropout(mlp(h), c.dropout, training_rng(self))
        x = x + Residual(name="mlp_residual")(x, h, y)
        return nn.with_logical_constraint(x, ("batch", "length", None))


class Embeddings(nn.Module):
    """Token and position tables, summed; virtual tokens come in at the token table's level and have positions too."""

    config: Gpt2Config

    def setup(self) -> None:
        c = self.config
        t = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        self.tokens = Embed(c.vocab_size, c.hidden_size, **t)
        self.positions = Embed(c.max_positions, c.hidden_size, ("position", "embed"), **t)
        self.prompt = Prompt()

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, segments: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, tuple | None]:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) if segments is None else within(segments)
        x, slots, positions = self.prompt(self.tokens(tokens), mask, positions)
        if x.shape[1] > (most := self.config.max_positions):
            raise ModelError(f"{x.shape[1]} tokens are more than the model's {most} positions: cut them.")
        x = dropout(x + self.positions(positions), self.config.dropout, training_rng(self))
        return x, slots, positions, self.prompt.past()

    def attend(self, x: jax.Array) -> jax.Array:
        return self.tokens.attend(x)


class Gpt2(Decoder):
    """The decoder. More tokens than positions are a ModelError; a position that is past the table's end only with the
    cache gives NaN.
    """

    config: Gpt2Config
    embeddings = Embeddings
    block = Block
    last_norm = LayerNorm
