"""Gemma 2 (arXiv 2408.00118) and the text part of Gemma 3 (arXiv 2503.19786).

    embed/tokens/embedding
    layers/attn_norm, layers/attn/{q,k,v,o,q_norm,k_norm}, layers/attn_post_norm
    layers/mlp_norm, layers/mlp/{gate,up,down}, layers/mlp_post_norm
    norm

Sublayers are normed before and after, norms scale by 1 + w, embeddings by sqrt(D); the output is the token table. All
but every `pattern`-th layer see a window only, with a rope theta of their own: one program for both kinds, told apart
by a flag that is scanned with the layers. Gemma 2 caps scores and logits, Gemma 3 norms queries and keys.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.models.decoder import Decoder, causal, together
from research.models.llama import Embeddings
from research.nn.attention import Attention
from research.nn.embed import Tied
from research.nn.layers import apply_layers
from research.nn.mlp import GatedMlp
from research.nn.norm import RMSNorm
from research.nn.rope import angles, frequencies
from research.nn.sites import Outputs, Residual


@dataclass(frozen=True)
class GemmaConfig:
    """Shapes and options.

    query_scale: scores are divided by its square root. pattern: every so manieth layer sees everything.
    rope_theta, rope_scaling: of those; local_theta of the others, which see sliding_window positions.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    query_scale: float
    max_positions: int = 32768
    rope_theta: float = 1e6
    rope_scaling: tuple | None = None
    local_theta: float = 10000.0
    sliding_window: int = 512
    pattern: int = 6
    norm_eps: float = 1e-6
    qk_norm: bool = True
    attention_softcap: float | None = None
    final_softcap: float | None = None
    tie_embeddings: bool = True
    family: str = "gemma3_text"
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"


def _config(d: int, layers: int, heads: int, kv: int, ffn: int, **more) -> GemmaConfig:
    more = {"vocab_size": 262144, "head_dim": 256, "query_scale": 256.0} | more
    return GemmaConfig(
        hidden_size=d, num_layers=layers, num_heads=heads, num_kv_heads=kv, intermediate_size=ffn, **more
    )


_GEMMA2 = {
    "vocab_size": 256000, "max_positions": 8192, "rope_theta": 10000.0, "sliding_window": 4096, "pattern": 2,
    "qk_norm": False, "attention_softcap": 50.0, "final_softcap": 30.0, "family": "gemma2",
}  # fmt: skip
_LONG = {"max_positions": 131072, "rope_scaling": ("linear", 8.0), "sliding_window": 1024, "vocab_size": 262208}

PRESETS = {
    "gemma3-270m": _config(640, 18, 4, 1, 2048),
    "gemma3-1b": _config(1152, 26, 4, 1, 6912),
    "gemma3-4b": _config(2560, 34, 8, 4, 10240, **_LONG),
    "gemma2-2b": _config(2304, 26, 8, 4, 9216, **_GEMMA2),
    "gemma2-9b": _config(3584, 42, 16, 8, 14336, **_GEMMA2),
}


class Block(nn.Module):
    """x = x + norm(attention(norm(x))); x = x + norm(mlp(norm(x)))."""

    config: GemmaConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, whole: jax.Array, masks: tuple[jax.Array, jax.Array], ropes: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """whole bool []: whether this layer sees everything; masks and ropes: those of the others, and its own."""
        c = self.config
        mask = jnp.where(whole, masks[1], masks[0])
        rope = jax.tree.map(lambda near, far: jnp.where(whole, far, near), *ropes)
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        norm = lambda name: RMSNorm(c.norm_eps, param_dtype=c.param_dtype, offset=1.0, name=name)  # noqa: E731
        attn = Attention(
            c.num_heads, c.num_kv_heads, c.head_dim, qk_norm_eps=c.norm_eps if c.qk_norm else None, norm_offset=1.0,
            scale=c.query_scale**-0.5, softcap=c.attention_softcap, name="attn", **types,
        )  # fmt: skip
        attn_norm, mlp = norm("attn_norm"), GatedMlp(c.intermediate_size, "gelu_tanh", name="mlp", **types)
        h = attn_norm(x)
        y = norm("attn_post_norm")(attn(h, mask, rope, attn_norm))
        x = x + Residual(name="attn_residual")(x, h, y)
        h = norm("mlp_norm")(x)
        x = x + Residual(name="mlp_residual")(x, h, norm("mlp_post_norm")(mlp(h)))
        return nn.with_logical_constraint(x, ("batch", "length", None))


class Gemma(Decoder):
    """The decoder, as `Decoder` in all but its blocks, its two kinds of layers and its logits."""

    config: GemmaConfig

    def setup(self) -> None:
        c = self.config
        self.embed = Embeddings(c)
        self.layers = Block(c) if c.scan else [Block(c) for _ in range(c.num_layers)]
        self.outputs = Outputs(c.num_layers)
        self.norm = RMSNorm(c.norm_eps, param_dtype=c.param_dtype, offset=1.0)
        self.lm_head = Tied()

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """As `Decoder`. Virtual tokens are scaled as tokens are, so that a vocabulary start is those tokens."""
        c = self.config
        mask = jnp.ones_like(tokens) if mask is None else mask
        embedded, slots, positions, past = self.embed(tokens, mask, segments)
        embedded *= jnp.asarray(c.hidden_size**0.5, c.dtype)
        masks = [causal(slots, positions, window, past) for window in (c.sliding_window, None)]
        if segments is not None:
            masks = [seen & together(segments, slots.shape[1] - tokens.shape[1]) for seen in masks]
        inverse = frequencies(c.head_dim, c.local_theta), frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        ropes = tuple(angles(positions, each) for each in inverse)
        whole = jnp.asarray(np.arange(1, c.num_layers + 1) % c.pattern == 0)
        collect = self.outputs.occupied
        x, layers = apply_layers(self.layers, c, embedded, tuple(masks), ropes, collect=collect, each=whole)
        x = self.norm(self.outputs(x, layers, embedded, masks[1])[:, -tokens.shape[1] :])
        if self.is_initializing():
            self.unembed(x[:, :1])
        return x

    def unembed(self, x: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V] fp32."""
        z, cap = self.lm_head(x, self.embed.attend(x)), self.config.final_softcap
        return z if cap is None else cap * jnp.tanh(z / cap)
