"""LLaMA (arXiv 2302.13971) and its kin by configuration: SmolLM2, Mistral (arXiv 2310.06825), Qwen2 (arXiv 2407.10671),
Qwen3 (arXiv 2505.09388).

    embed/tokens/embedding
    layers/attn_norm, layers/attn/{q,k,v,o,q_norm,k_norm}, layers/mlp_norm, layers/mlp/{gate,up,down}
    norm, lm_head

Leaves under `layers` have a leading axis L where the stack is scanned; q_norm and k_norm are Qwen3's; a tied model has
no lm_head.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models.decoder import Decoder, within
from research.nn.attention import Attention
from research.nn.embed import Embed
from research.nn.mlp import GatedMlp
from research.nn.norm import RMSNorm
from research.nn.rope import angles, frequencies
from research.nn.sites import Prompt, Residual


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and options.

    sliding_window: a query sees that many last positions, itself included. rope_scaling: see `research.nn.rope`.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: tuple | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    family: str = "llama"
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    kernel: str = "xla"


_LLAMA31 = ("llama3", 8.0, 1.0, 4.0, 8192)
_LLAMA32 = ("llama3", 32.0, 1.0, 4.0, 8192)
_LLAMA3 = {"vocab_size": 128256, "head_dim": 128, "num_kv_heads": 8, "rope_theta": 500000.0}
_QWEN2 = {
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "max_positions": 32768,
    "qkv_bias": True,
    "family": "qwen2",
}
_QWEN3 = {
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "max_positions": 40960,
    "qk_norm": True,
    "family": "qwen3",
    "head_dim": 128,
    "num_kv_heads": 8,
}


def _config(d: int, layers: int, heads: int, ffn: int, **more) -> LlamaConfig:
    more = {"num_kv_heads": heads, "head_dim": d // heads} | more
    return LlamaConfig(hidden_size=d, num_layers=layers, num_heads=heads, intermediate_size=ffn, **more)


PRESETS = {
    "smollm2-135m": _config(
        576, 30, 9, 1536, vocab_size=49152, num_kv_heads=3, max_positions=8192, rope_theta=1e5, tie_embeddings=True
    ),
    "smollm2-360m": _config(
        960, 32, 15, 2560, vocab_size=49152, num_kv_heads=5, max_positions=8192, rope_theta=1e5, tie_embeddings=True
    ),
    "smollm2-1.7b": _config(
        2048, 24, 32, 8192, vocab_size=49152, max_positions=8192, rope_theta=130000.0, tie_embeddings=True
    ),
    "llama-7b": _config(4096, 32, 32, 11008, vocab_size=32000, norm_eps=1e-6),
    "llama2-7b": _config(4096, 32, 32, 11008, vocab_size=32000, max_positions=4096),
    "llama2-13b": _config(5120, 40, 40, 13824, vocab_size=32000, max_positions=4096),
    "llama2-70b": _config(8192, 80, 64, 28672, vocab_size=32000, max_positions=4096, num_kv_heads=8),
    "llama3-8b": _config(4096, 32, 32, 14336, max_positions=8192, **_LLAMA3),
    "llama3-70b": _config(8192, 80, 64, 28672, max_positions=8192, **_LLAMA3),
    "llama3.1-8b": _config(4096, 32, 32, 14336, max_positions=131072, rope_scaling=_LLAMA31, **_LLAMA3),
    "llama3.1-70b": _config(8192, 80, 64, 28672, max_positions=131072, rope_scaling=_LLAMA31, **_LLAMA3),
    "llama3.1-405b": _config(16384, 126, 128, 53248, max_positions=131072, rope_scaling=_LLAMA31, **_LLAMA3),
    "llama3.2-1b": _config(
        2048,
        16,
        32,
        8192,
        max_positions=131072,
        rope_scaling=_LLAMA32,
        tie_embeddings=True,
        **(_LLAMA3 | {"head_dim": 64}),
    ),
    "llama3.2-3b": _config(
        3072, 28, 24, 8192, max_positions=131072, rope_scaling=_LLAMA32, tie_embeddings=True, **_LLAMA3
    ),
    "mistral-7b": _config(
        4096,
        32,
        32,
        14336,
        vocab_size=32000,
        num_kv_heads=8,
        max_positions=32768,
        sliding_window=4096,
        family="mistral",
    ),
    "qwen2-0.5b": _config(896, 24, 14, 4864, num_kv_heads=2, tie_embeddings=True, **_QWEN2),
    "qwen2-7b": _config(3584, 28, 28, 18944, num_kv_heads=4, **(_QWEN2 | {"vocab_size": 152064})),
    "qwen3-0.6b": _config(1024, 28, 16, 3072, tie_embeddings=True, **_QWEN3),
    "qwen3-8b": _config(4096, 36, 32, 12288, **_QWEN3),
}


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        c = self.config
        attn = Attention(
            c.num_heads, c.num_kv_heads, c.head_dim, qkv_bias=c.qkv_bias, qk_norm_eps=c.norm_eps if c.qk_norm else None,
            kernel=c.kernel, dtype=c.dtype, param_dtype=c.param_dtype, name="attn",
        )  # fmt: skip
        mlp = GatedMlp(c.intermediate_size, dtype=c.dtype, param_dtype=c.param_dtype, name="mlp")
        attn_norm = RMSNorm(c.norm_eps, param_dtype=c.param_dtype, name="attn_norm")
        h = attn_norm(x)
        x = x + Residual(name="attn_residual")(x, h, attn(h, mask, (cos, sin), attn_norm))
        h = RMSNorm(c.norm_eps, param_dtype=c.param_dtype, name="mlp_norm")(x)
        x = x + Residual(name="mlp_residual")(x, h, mlp(h))
        return nn.with_logical_constraint(x, ("batch", "length", None))


class Embeddings(nn.Module):
    """The token table; virtual tokens come before the sequence."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        self.tokens = Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype)
        self.prompt = Prompt()

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, segments: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, tuple | None]:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) if segments is None else within(segments)
        x, slots, positions = self.prompt(self.tokens(tokens), mask, positions)
        return x, slots, positions, self.prompt.past()

    def attend(self, x: jax.Array) -> jax.Array:
        return self.tokens.attend(x)


class Llama(Decoder):
    """The decoder, with rotary positions."""

    config: LlamaConfig
    embeddings = Embeddings
    block = Block
    last_norm = RMSNorm

    def given(self, positions: jax.Array, past: tuple[jax.Array, jax.Array] | None) -> tuple:
        c = self.config
        return angles(positions, frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
