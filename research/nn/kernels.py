"""Attention by the name of its implementation.

    xla      two products and a softmax (`attention.attend`): everywhere, and for all that nodes may ask for
    cudnn    cuDNN's flash attention, on a GPU, in half precision
    splash   Pallas' flash attention on a TPU; elsewhere interpreted, which is slow and for tests

The last two never hold the scores [B, H, T, S]. What is not for them is done by xla, and is the same up to rounding: a
gate, a bias, dropout or a cache (`Attention` looks for those), and rows that a mesh does not share evenly (`fused`).
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from research.errors import FlagError, did_you_mean

NAMES = ("xla", "cudnn", "splash")
BLOCK = 128  # splash works on so many queries and keys at a time at least


@struct.dataclass
class Sight:
    """A causal mask, and what it was made from.

    seen: bool [B, T, T]. documents: int32 [B, T], 0 for padding; queries see keys of their own document, at or before
    them and within `window`. packed: whether there are several in a row, so that virtual keys are of none of them.
    """

    seen: jax.Array
    documents: jax.Array
    window: int | None = struct.field(pytree_node=False)
    packed: bool = struct.field(pytree_node=False)


def check(name: str) -> str:
    """The name. FlagError where there is no such implementation."""
    if name not in NAMES:
        raise FlagError(f"unknown attention {name!r}.{did_you_mean(name, NAMES)}")
    return name


def attending(config: Any, name: str) -> Any:
    """A model's configuration with that attention. FlagError where it has xla's only."""
    if name == getattr(config, "kernel", "xla"):
        return config
    if not hasattr(config, "kernel"):
        raise FlagError(f"attention={name!r} is for the families of LLaMA and GPT-2: {config.family} has 'xla'.")
    return dataclasses.replace(config, kernel=name)


def fused(
    name: str, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, sight: Sight | None, scale: float
) -> jax.Array | None:
    """q [B, T, H, K], k and v [B, S, kv_heads, K], mask bool [B, T or 1, S] -> [B, T, H*K], or None.

    S - T virtual keys may stand in front of the T that `sight` tells of.
    """
    if name == "cudnn":
        if jax.default_backend() != "gpu" or q.dtype.itemsize > 2:
            raise FlagError("attention='cudnn' is for a GPU and --dtype=bfloat16. Valid everywhere: 'xla'.")
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")
        return y.reshape(*y.shape[:2], -1)
    virtual = k.shape[1] - q.shape[1]
    if name != "splash" or sight is None or (sight.packed and virtual):
        return None
    front = jnp.where(jnp.broadcast_to(mask[:, 0, :virtual], (len(q), virtual)), 1, -1)
    # A query that is padding has no document: it may see padding, and nobody reads what it gives.
    own = jnp.minimum(sight.documents, 1) if virtual else sight.documents
    ids = own, jnp.concatenate([front, own], axis=1)
    call = lambda *arrays: jax.lax.platform_dependent(  # noqa: E731
        *arrays, tpu=lambda *a: _splash(*a, sight.window, False), default=lambda *a: _splash(*a, sight.window, True)
    )
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        rows, heads, length = (nn.logical_to_mesh_axes((axis,))[0] for axis in ("batch", "heads", "length"))
        if len(q) % _shards(mesh, rows) or _shards(mesh, length) > 1:
            return None
        if q.shape[2] % _shards(mesh, heads) or k.shape[2] % _shards(mesh, heads):
            heads = None  # every device has all of them
        each, ids_spec = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
        specs = (each, each, each, ids_spec, ids_spec)
        call = jax.shard_map(call, in_specs=specs, out_specs=each, check_vma=False)
    y = call(q * scale, k, v, *ids)
    return y.reshape(*y.shape[:2], -1)


def _shards(mesh: Any, axes: str | tuple[str, ...] | None) -> int:
    """Over how many devices those axes of the mesh share an array's dimension."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, q_ids: jax.Array, k_ids: jax.Array, window: int | None, interpret: bool
) -> jax.Array:
    """One device's part: q [B, T, H, K], k and v [B, S, kv_heads, K], ids [B, T] and [B, S] -> [B, T, H, K]."""
    # Pallas takes a while to import, and most programs do without.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, s = q.shape[1], k.shape[1]
    # Whole blocks. A query of the filling has a key of the filling to see: a row without any would be NaN.
    more_t = -t % BLOCK
    more_s = more_t + -(s + more_t) % BLOCK
    fill = lambda x, more, value=0: jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2), constant_values=value)  # noqa: E731
    shape, offset = (t + more_t, s + more_s), s - t
    one = masks.CausalMask(shape, offset) if window is None else masks.LocalMask(shape, (window - 1, 0), offset)
    q_block, k_block = (next(b for b in (512, 384, 256, BLOCK) if size % b == 0) for size in shape)
    sizes = {f"block_q{part}": q_block for part in ("", "_dkv", "_dq")}
    sizes |= {f"block_kv{part}": k_block for part in ("", "_compute", "_dkv", "_dkv_compute", "_dq")}
    blocks = kernels.BlockSizes(**sizes)
    every = masks.MultiHeadMask([one] * q.shape[2])
    kernel = kernels.make_splash_mha(every, head_shards=1, q_seq_shards=1, block_sizes=blocks, interpret=interpret)
    ids = kernels.SegmentIds(fill(q_ids, more_t, -2), fill(k_ids, more_s, -2))
    heads_first = lambda x, more: fill(x, more).transpose(0, 2, 1, 3)  # noqa: E731
    y = jax.vmap(kernel)(heads_first(q, more_t), heads_first(k, more_s), heads_first(v, more_s), ids)
    return y.transpose(0, 2, 1, 3)[:, :t]
