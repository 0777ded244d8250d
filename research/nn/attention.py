"""Multi-head attention with grouped keys, and the site `attention`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.kernels import Sight, fused
from research.nn.linear import Linear
from research.nn.norm import RMSNorm
from research.nn.param import dropout, training_rng
from research.nn.rope import rotate
from research.nn.sites import KeysValues


class Projection(NamedTuple):
    """What a node may do with virtual tokens [..., D]: calling it gives keys and values [..., kv_heads, K].

    `norm` is the layer norm in front of the attention (pre-LN) or the identity.
    """

    keys_values: Callable
    norm: Callable

    def __call__(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.keys_values(h)


class Attention(nn.Module):
    """softmax(cap(scale * q k' + bias)) v with `num_heads` queries over `num_kv_heads` keys.

    scale: 1 / sqrt(K) where None; T5 has 1. softcap: cap(s) = softcap * tanh(s / softcap) (Gemma 2).
    alibi: adds slope_h * (the key's position) (arXiv 2108.12409).
    cross: keys and values are made from another sequence. keep: whether later tokens read them (not in an encoder).
    qk_norm_eps: RMSNorm over each head of q and k before rotation (Qwen3, Gemma 3) where it is given, its scale plus
    `norm_offset`. kernel: one of `kernels.NAMES`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None
    norm_offset: float = 0.0
    dropout: float = 0.0
    scale: float | None = None
    softcap: float | None = None
    alibi: bool = False
    cross: bool = False
    keep: bool = True
    kernel: str = "xla"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | Sight,
        rope: tuple[jax.Array, jax.Array] | None = None,
        norm: Callable = lambda x: x,
        *,
        bias: jax.Array | None = None,
        positions: jax.Array | None = None,
        context: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, T, D], mask bool [B, T or 1, S] (True: a query may look) or a `Sight`, rope (cos, sin) -> [B, T, D].

        norm: the one that made x, for nodes whose tokens have yet to go through it.
        bias: [B or 1, H, T, S], added to the scores; virtual keys have none. positions: of the keys [B, S], for alibi.
        context [B, S, D]: the other sequence of `cross`; None where its keys are in the cache.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        sight, mask = (mask, mask.seen) if isinstance(mask, Sight) else (None, mask)
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        project_q = Linear(width, ("embed", "heads"), self.qkv_bias, name="q", **types)
        project_k = Linear(kv_width, ("embed", "kv_heads"), self.qkv_bias, name="k", **types)
        project_v = Linear(kv_width, ("embed", "kv_heads"), self.qkv_bias, name="v", **types)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], -1, self.head_dim)

        kv, source = KeysValues(self.cross, self.keep, name="kv"), context if self.cross else x
        q = heads(project_q(x))
        k, v = kv.known() or (heads(project_k(source)), heads(project_v(source)))
        if self.qk_norm_eps is not None:
            norms = {"param_dtype": self.param_dtype, "offset": self.norm_offset}
            q = RMSNorm(self.qk_norm_eps, name="q_norm", **norms)(q)
            k = RMSNorm(self.qk_norm_eps, name="k_norm", **norms)(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        project = Projection(lambda h: (heads(project_k(h)), heads(project_v(h))), norm)
        k, v, past, mask, gate = kv(k, v, mask, x, project)
        if self.alibi:
            virtual = mask.shape[-1] - positions.shape[-1]
            front = jnp.broadcast_to(jnp.arange(virtual), (positions.shape[0], virtual))
            positions = jnp.concatenate([front, positions], axis=1).astype(jnp.float32)
            bias = slopes(self.num_heads)[:, None, None] * positions[:, None, None, :]
        elif bias is not None:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (mask.shape[-1] - bias.shape[-1], 0)))
        rng, y = training_rng(self), None
        plain = (
            past is None
            and gate is None
            and bias is None
            and self.softcap is None
            and (rng is None or not self.dropout)
        )
        if self.kernel != "xla" and plain:
            y = fused(self.kernel, q, k, v, mask, sight, self.head_dim**-0.5 if self.scale is None else self.scale)
        if y is None:
            options = {"past": past, "scale": self.scale, "softcap": self.softcap, "bias": bias}
            y = attend(q, k, v, mask, self.dropout, rng, gate, **options)
        y = kv.attended(q, y, x, project)
        return Linear(x.shape[-1], ("heads", "embed"), self.out_bias, name="o", **types)(y)


def slopes(num_heads: int) -> jax.Array:
    """ALiBi's slope of each head [H]: 2^(-8/n), 2^(-16/n), ... for n heads, a power of two; other numbers take the
    powers of two below and then every second one of twice that (arXiv 2108.12409, as BLOOM has it).
    """
    n = 2 ** math.floor(math.log2(num_heads))
    found = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    found += [2 ** (-4 * (2 * i + 1) / n) for i in range(num_heads - n)]
    return jnp.asarray(found, jnp.float32)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    rate: float = 0.0,
    rng: jax.Array | None = None,
    gate: jax.Array | None = None,
    *,
    past: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """q [B, T, H, K], k and v [B, S, kv_heads, K], mask bool [B, T or 1, S] -> [B, T, H*K]. A row without a key gives a
    mean, not NaN. gate [B, T, P] multiplies scores and probabilities of the first P keys; bias [B or 1, H, T or 1, S].
    past: keys and values of N more, in front; then S in the other shapes is N + S.

    The queries that share a key head are one batched product [B*kv_heads, G*T, K] x [B*kv_heads, K, S]. Of a cache the
    scores are concatenated, and not the keys and values, which are many.
    """
    batch, t, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    parts = [(k, v)] if past is None else [past, (k, v)]
    s = sum(keys.shape[1] for keys, _ in parts)
    groups = num_heads // num_kv_heads
    q = q.reshape(batch, t, num_kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, num_kv_heads, groups * t, head_dim) * (head_dim**-0.5 if scale is None else scale)
    each = [jnp.matmul(q, keys.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32) for keys, _ in parts]
    scores = each[0] if past is None else jnp.concatenate(each, axis=-1)
    scores = scores.reshape(batch, num_kv_heads, groups, t, s)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias.reshape(-1, num_kv_heads, groups, *bias.shape[2:])
    if gate is not None:
        gate = jnp.pad(gate, ((0, 0), (0, 0), (0, s - gate.shape[-1])), constant_values=1.0)[:, None, None]
        scores *= gate
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = dropout(jax.nn.softmax(scores, axis=-1), rate, rng)
    probs = (probs if gate is None else probs * gate).astype(v.dtype)
    probs = probs.reshape(batch, num_kv_heads, groups * t, s)
    first = s - k.shape[1]
    y = jnp.matmul(probs[..., first:], v.transpose(0, 2, 1, 3))
    if past is not None:
        y += jnp.matmul(probs[..., :first], past[1].transpose(0, 2, 1, 3))
    y = y.reshape(batch, num_kv_heads, groups, t, head_dim).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, t, num_heads * head_dim)
