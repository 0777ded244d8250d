"""A small U-Net of the DDPM (arXiv 2006.11239) and ADM (arXiv 2105.05233) kind.

    condition/{time/{in,out},labels/embedding,text}            c, one vector an image
    input, down{level}_{i}/..., shrink{level}, middle0, middle1, up{level}_{i}/..., grow{level}, final_norm, output
    a block: first_norm, conv1, time, second_norm, conv2, skip; some: attention/{attn/{q,k,v,o},mlp/{up,down}}

    h = conv1(silu(norm(x)));  s, m = time(silu(c));  h = conv2(silu(norm(h) (1 + m) + s));  x = skip(x) + h

The attention is followed by an MLP, as in latent diffusion (arXiv 2112.10752): with it every method's default targets
are there. Convolutions are no sites; `attn/(q|v)`, `mlp/down` or `time` are. There is no stack of equal layers, so that
nothing is scanned (`scan` has no effect; `targets=.*` stands for all), and no embedded sequence that something could
stand before: prompts and prefixes are refused.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import ModelError
from research.models.dit import mlp
from research.nn.attention import Attention
from research.nn.conv import Conv, GroupNorm, upsample
from research.nn.layers import REMAT
from research.nn.linear import Linear
from research.nn.sites import Residual
from research.nn.time import Condition


@dataclass(frozen=True)
class UnetConfig:
    """Shapes and options. Level i has width * multipliers[i] channels, `blocks` blocks on the way down and one more on
    the way up, and attends where attention[i]. learn_sigma: 2C channels come out.
    """

    image_size: int = 28
    channels: int = 1
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    attention: tuple[bool, ...] = (False, False, True)
    blocks: int = 1
    head_dim: int = 32
    groups: int = 8
    num_classes: int = 10
    text_features: int = 0
    learn_sigma: bool = False
    family: str = "unet"
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"


PRESETS = {
    "unet-tiny": UnetConfig(),
    "unet-mini": UnetConfig(width=48, attention=(False, True, True), head_dim=48),
    "unet-mini64": UnetConfig(
        64, 3, 32, (1, 2, 3, 4), (False, False, True, True), num_classes=0, text_features=384
    ),
}  # fmt: skip


class SpatialAttention(nn.Module):
    """Attention over all places, then an MLP, each behind a norm and beside the stream."""

    config: UnetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> the same shape."""
        c, shape = self.config, x.shape
        t = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        heads = max(1, shape[-1] // c.head_dim)
        attn = Attention(heads, heads, shape[-1] // heads, qkv_bias=True, out_bias=True, name="attn", **t)
        feed_forward = mlp(shape[-1], 4 * shape[-1], **t)

        def tokens(x: jax.Array) -> jax.Array:
            return x.reshape(shape[0], -1, shape[-1])

        h = tokens(GroupNorm(c.groups, param_dtype=c.param_dtype, name="attn_norm")(x))
        y = attn(h, jnp.ones((1, 1, h.shape[1]), bool))
        x += Residual(name="attn_residual")(tokens(x), h, y).reshape(shape)
        h = tokens(GroupNorm(c.groups, param_dtype=c.param_dtype, name="mlp_norm")(x))
        return x + Residual(name="mlp_residual")(tokens(x), h, feed_forward(h)).reshape(shape)


class Block(nn.Module):
    """Two convolutions, the condition between them, beside the stream; then attention where it is wanted."""

    config: UnetConfig
    features: int
    attends: bool

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """x [B, H, W, C], condition [B, D] -> [B, H, W, features]."""
        c = self.config
        t = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        h = jax.nn.silu(GroupNorm(c.groups, param_dtype=c.param_dtype, name="first_norm")(x))
        h = Conv(self.features, name="conv1", **t)(h)
        parts = Linear(2 * self.features, ("embed", None), name="time", **t)(jax.nn.silu(condition))
        shift, scale = jnp.split(parts[:, None, None], 2, axis=-1)
        h = GroupNorm(c.groups, param_dtype=c.param_dtype, name="second_norm")(h) * (1 + scale) + shift
        h = Conv(self.features, zero=True, name="conv2", **t)(jax.nn.silu(h))
        if x.shape[-1] != self.features:
            x = Linear(self.features, (None, "embed"), init_std=x.shape[-1] ** -0.5, name="skip", **t)(x)
        x += h
        return SpatialAttention(c, name="attention")(x) if self.attends else x


class Unet(nn.Module):
    """The denoiser."""

    config: UnetConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, labels: jax.Array | None = None, text: jax.Array | None = None
    ) -> jax.Array:
        """x [B, H, W, C], t [B] in [0, 1], labels int [B] (num_classes: no class), text [B, E]
        (zeros: no text) -> [B, H, W, C] in fp32, 2C with learn_sigma.

        ModelError for a size that can't be halved as often as there are levels, and for labels or a text that the model
        can't take.
        """
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        factor = 2 ** (len(c.multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ModelError(
                f"image size {x.shape[1]}x{x.shape[2]} can't be halved {len(c.multipliers) - 1} times."
                f" Valid: multiples of {factor}."
            )
        block = Block if c.remat == "none" else nn.remat(Block, policy=REMAT[c.remat])
        condition = Condition(4 * c.width, c.num_classes, c.text_features, name="condition", **types)(t, labels, text)
        h = Conv(c.width, name="input", **types)(x)
        skips, levels = [h], [(i, c.width * m, c.attention[i]) for i, m in enumerate(c.multipliers)]
        for level, features, attends in levels:
            if level:
                h = Conv(features, stride=2, name=f"shrink{level}", **types)(h)
                skips.append(h)
            for i in range(c.blocks):
                h = block(c, features, attends, name=f"down{level}_{i}")(h, condition)
                skips.append(h)
        h = block(c, h.shape[-1], True, name="middle0")(h, condition)
        h = block(c, h.shape[-1], False, name="middle1")(h, condition)
        for level, features, attends in reversed(levels):
            for i in range(c.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(c, features, attends, name=f"up{level}_{i}")(h, condition)
            if level:
                h = Conv(features, name=f"grow{level}", **types)(upsample(h))
        h = jax.nn.silu(GroupNorm(c.groups, param_dtype=c.param_dtype, name="final_norm")(h))
        channels = c.channels * (2 if c.learn_sigma else 1)
        return Conv(channels, zero=True, name="output", **types)(h).astype(jnp.float32)

    def example(self) -> tuple[jax.Array, jax.Array]:
        """Inputs of the right shapes, for `init`."""
        c = self.config
        return jnp.zeros((1, c.image_size, c.image_size, c.channels)), jnp.zeros((1,))
