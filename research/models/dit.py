"""DiT (arXiv 2212.09748): a transformer over image patches, told time, class and text by adaLN-Zero.

    condition/{time/{in,out},labels/embedding,text}          c, one vector an image
    embed/patches/project                                    + a fixed table of positions
    layers/modulation, layers/attn/{q,k,v,o}, layers/mlp/{up,down}
    final/{modulation,project}

    s1, m1, g1, s2, m2, g2 = modulation(silu(c))             zero at first, so each block starts as the identity
    x = x + g1 attn(norm(x) (1 + m1) + s1);  x = x + g2 mlp(norm(x) (1 + m2) + s2)

Leaves under `layers` have a leading axis L where the stack is scanned. A node at a residual site comes after the gate,
at what is added to the stream; virtual tokens stand before the patches and have no position.

Deviations: q, k and v are three projections, not one, so that a node can sit at each; and the kernels of patches and
attention start from N(0, 0.02^2), as everywhere in this project, not by Glorot's rule.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.attention import Attention
from research.nn.layers import apply_layers
from research.nn.linear import Linear
from research.nn.mlp import Mlp
from research.nn.patches import Patches, fold, sincos
from research.nn.sites import Outputs, Prompt, Residual
from research.nn.time import Condition


@dataclass(frozen=True)
class DitConfig:
    """Shapes and options; the defaults are DiT-S/2 on latents 32x32x4 of 1000 classes.

    num_classes, text_features: 0 for a model without classes or texts. learn_sigma: 2C channels come out.
    `dtype` is the compute dtype, `param_dtype` the parameters'.
    """

    image_size: int = 32
    channels: int = 4
    patch: int = 2
    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    intermediate_size: int = 1536
    num_classes: int = 1000
    text_features: int = 0
    learn_sigma: bool = True
    family: str = "dit"
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"


def _config(width: int, depth: int, heads: int, **others) -> DitConfig:
    return DitConfig(hidden_size=width, num_layers=depth, num_heads=heads, intermediate_size=4 * width, **others)


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
_GREY = {"image_size": 28, "channels": 1, "num_classes": 10, "learn_sigma": False}
_COLOUR = {"image_size": 64, "channels": 3, "num_classes": 0, "text_features": 384, "learn_sigma": False}

PRESETS = {f"dit-{name}{p}": _config(*size, patch=p) for name, size in _SIZES.items() for p in (2, 4, 8)} | {
    "dit-tiny": _config(128, 4, 4, patch=7, **_GREY),
    "dit-mini": _config(128, 4, 4, patch=4, **_GREY),
    "dit-mini64": _config(192, 6, 6, patch=8, **_COLOUR),
}


def norm(x: jax.Array) -> jax.Array:
    """Layer norm without parameters, in fp32."""
    return jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-6).astype(x.dtype)


def mlp(width: int, hidden: int, **types: str) -> Mlp:
    """GELU by tanh; the kernels start with the variance of Glorot's rule."""
    return Mlp(hidden, "gelu_tanh", init_std=(2 / (width + hidden)) ** 0.5, name="mlp", **types)


class Embeddings(nn.Module):
    """Patches with their positions; virtual tokens come before them."""

    config: DitConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images [B, H, W, C] -> x [B, P + N, D], mask [B, P + N]."""
        c = self.config
        x = Patches(c.patch, c.hidden_size, c.dtype, c.param_dtype, name="patches")(images)
        x += jnp.asarray(sincos(images.shape[1] // c.patch, images.shape[2] // c.patch, c.hidden_size), x.dtype)
        mask = jnp.ones(x.shape[:2], jnp.int32)
        x, mask, _ = Prompt(name="prompt")(x, mask, jnp.cumsum(mask, axis=1) - 1)
        return x, mask


class Block(nn.Module):
    """Attention and MLP, each between a modulated norm and a gate."""

    config: DitConfig

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, mask: jax.Array) -> jax.Array:
        """x [B, T, D], condition [B, D], mask bool [B, 1, T] -> [B, T, D]."""
        c = self.config
        t = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        modulation = Linear(6 * c.hidden_size, ("embed", None), init_std=0.0, name="modulation", **t)
        parts = jnp.split(modulation(jax.nn.silu(condition))[:, None], 6, axis=-1)
        shift, scale, gate = parts[:3]
        h = norm(x) * (1 + scale) + shift
        head_dim = c.hidden_size // c.num_heads
        attn = Attention(c.num_heads, c.num_heads, head_dim, qkv_bias=True, out_bias=True, name="attn", **t)
        x += Residual(name="attn_residual")(x, h, gate * attn(h, mask))
        shift, scale, gate = parts[3:]
        h = norm(x) * (1 + scale) + shift
        x += Residual(name="mlp_residual")(x, h, gate * mlp(c.hidden_size, c.intermediate_size, **t)(h))
        return nn.with_logical_constraint(x, ("batch", "length", None))


class Final(nn.Module):
    """A modulated norm and the projection to pixels, both zero at first."""

    config: DitConfig

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """x [B, N, D], condition [B, D] -> [B, N, P*P*C], twice that with learn_sigma."""
        c = self.config
        t = {"dtype": c.dtype, "param_dtype": c.param_dtype, "init_std": 0.0}
        modulation = Linear(2 * c.hidden_size, ("embed", None), name="modulation", **t)
        shift, scale = jnp.split(modulation(jax.nn.silu(condition))[:, None], 2, axis=-1)
        features = c.patch**2 * c.channels * (2 if c.learn_sigma else 1)
        return Linear(features, ("embed", None), name="project", **t)(norm(x) * (1 + scale) + shift)


class Dit(nn.Module):
    """The denoiser."""

    config: DitConfig

    def setup(self) -> None:
        c = self.config
        self.condition = Condition(c.hidden_size, c.num_classes, c.text_features, c.dtype, c.param_dtype)
        self.embed = Embeddings(c)
        self.layers = Block(c) if c.scan else [Block(c) for _ in range(c.num_layers)]
        self.outputs = Outputs(c.num_layers)
        self.final = Final(c)

    def __call__(
        self, x: jax.Array, t: jax.Array, labels: jax.Array | None = None, text: jax.Array | None = None
    ) -> jax.Array:
        """x [B, H, W, C], t [B] in [0, 1], labels int [B] (num_classes: no class), text [B, E] (zeros: no text)
        -> [B, H, W, C] in fp32, 2C with learn_sigma.

        ModelError for a size that the patch does not divide, and for labels or a text that the model can't take.
        """
        c = self.config
        condition = self.condition(t, labels, text)
        embedded, slots = self.embed(x)
        seen = slots[:, None, :].astype(bool)
        h, layers = apply_layers(self.layers, c, embedded, condition, seen, collect=self.outputs.occupied)
        count = x.shape[1] * x.shape[2] // c.patch**2
        h = self.outputs(h, layers, embedded, seen)[:, -count:]
        return fold(self.final(h, condition), c.patch, *x.shape[1:3]).astype(jnp.float32)

    def example(self) -> tuple[jax.Array, jax.Array]:
        """Inputs of the right shapes, for `init`."""
        c = self.config
        return jnp.zeros((1, c.image_size, c.image_size, c.channels)), jnp.zeros((1,))
