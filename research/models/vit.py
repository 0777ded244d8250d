"""Vision transformer (ViT, arXiv 2010.11929, section 3.1): a pre-LN encoder of image patches.

    embed/stem_I/{conv,norm}, embed/patches, embed/class_token [1, D], embed/positions/embedding [N, D]
    layers/attn_norm, layers/attn/{q,k,v,o}, layers/mlp_norm, layers/mlp/{up,down}
    norm, head (presets of published size: 1000 classes), map (pooling = map)

    x = [class; patches E] + positions;    x += attention(norm(x));    x += mlp(norm(x))

A stem, if there is one, is 3x3 convolutions of stride 2, each with a norm over channels and a GELU, and patches are of
what they leave (arXiv 2106.14881, section 4, where the norm is a batch's and the patch one place). It is no site.
Pooling: `token` is the class token's hidden state, `gap` the mean over patches of a model without a class token
(arXiv 2205.01580), `map` attention from one learnt query (arXiv 2106.04560). Virtual tokens come in behind the
positions and have none; attention knows no order, so in front of the class token is where the VPT paper has them.
Drop-path has one rate in all layers, where timm's rises with depth: a scanned stack is one program. Initial values are
N(0, 0.02^2) for all kernels, tables and tokens (the paper's code has Xavier's), and 0 for biases.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import ModelError
from research.nn.attention import Attention, attend
from research.nn.conv import Conv
from research.nn.embed import Embed
from research.nn.layers import apply_layers
from research.nn.linear import Linear
from research.nn.mlp import Mlp
from research.nn.norm import LayerNorm
from research.nn.param import dropout, get_param, training_rng
from research.nn.patches import divides, unfold
from research.nn.sites import Outputs, Prompt, Residual

POOLINGS = ("token", "gap", "map")


@dataclass(frozen=True)
class VitConfig:
    """Shapes and options.

    image_size, patch: pixels of a side, of the image and of what the stem leaves of it; channels: of a pixel.
    stem: channels of its convolutions, each of which halves the sides (an odd one is rounded up).
    num_classes: of the head that the parameters hold, 0 for none; a task's own head is apart.
    drop_path: probability that a sublayer is left out for a row in training.
    pre_norm, patch_bias: CLIP's tower has a norm before its layers and no bias in its patches.
    """

    image_size: int = 224
    patch: int = 16
    channels: int = 3
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    num_classes: int = 0
    pooling: str = "token"
    norm_eps: float = 1e-6
    activation: str = "gelu"
    pre_norm: bool = False
    patch_bias: bool = True
    stem: tuple[int, ...] = ()
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    family: str = "vit"
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"

    @property
    def grid(self) -> int:
        """How many patches a side has. ModelError where the patch does not divide what the stem leaves."""
        side = -(-self.image_size // 2 ** len(self.stem))
        divides(self.patch, side, side, "what the stem leaves," if self.stem else "image size")
        return side // self.patch

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return self.grid**2


_SIZES = {  # D, L, H, F
    "ti": (192, 12, 3, 768), "s": (384, 12, 6, 1536), "b": (768, 12, 12, 3072), "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
}  # fmt: skip


def _preset(size: str, patch: int) -> VitConfig:
    d, layers, heads, hidden = _SIZES[size]
    return VitConfig(224, patch, 3, d, layers, heads, hidden, num_classes=1000)


_PUBLISHED = ("ti/16", "s/16", "s/32", "b/16", "b/32", "l/16", "l/32", "h/14")
PRESETS = {f"vit-{name.replace('/', '')}": _preset(name.split("/")[0], int(name.split("/")[1])) for name in _PUBLISHED}
PRESETS["vit-mini"] = VitConfig(28, 4, 1, 128, 6, 4, 512)
PRESETS["vit-micro"] = VitConfig(28, 7, 1, 64, 4, 4, 256)


class Stem(nn.Module):
    """gelu(norm(conv(x))), half as high and wide."""

    features: int
    norm_eps: float
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), features]."""
        t = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Conv(self.features, stride=2, name="conv", **t)(x)
        return jax.nn.gelu(LayerNorm(self.norm_eps, param_dtype=self.param_dtype, name="norm")(x))


class Embeddings(nn.Module):
    """Patches behind a class token, with learnt positions; virtual tokens come in behind both."""

    config: VitConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        t = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        if images.shape[1:] != (wanted := (c.image_size, c.image_size, c.channels)):
            raise ModelError(f"images of {list(images.shape[1:])} do not fit the model's {list(wanted)}: resize them.")
        x = images
        for i, width in enumerate(c.stem):
            x = Stem(width, c.norm_eps, name=f"stem_{i}", **t)(x)
        x = Linear(c.hidden_size, (None, "embed"), c.patch_bias, name="patches", **t)(unfold(x, c.patch))
        if c.pooling == "token":
            draw = nn.initializers.normal(0.02)
            token = get_param(self, "class_token", draw, (1, c.hidden_size), (None, "embed"), c.param_dtype)
            first = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, c.hidden_size))
            x = jnp.concatenate([first, x], axis=1)
        places = jnp.arange(x.shape[1])
        x += Embed(x.shape[1], c.hidden_size, ("position", "embed"), name="positions", **t)(places)
        x = dropout(x, c.dropout, training_rng(self))
        ones = jnp.ones(x.shape[:2], jnp.int32)
        x, mask, _ = Prompt(name="prompt")(x, ones, ones * places)
        return (LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="norm")(x) if c.pre_norm else x), mask


def mlp_of(c: VitConfig) -> Mlp:
    """The feed-forward of a block, and of the pooling by attention."""
    return Mlp(c.intermediate_size, c.activation, c.dropout, c.dtype, c.param_dtype, name="mlp")


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        attn = Attention(
            c.num_heads, c.num_heads, c.hidden_size // c.num_heads, qkv_bias=True, out_bias=True,
            dropout=c.attention_dropout, dtype=c.dtype, param_dtype=c.param_dtype, name="attn",
        )  # fmt: skip
        attn_norm = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="attn_norm")
        h = attn_norm(x)
        y = dropout(attn(h, mask, norm=attn_norm), c.dropout, training_rng(self))
        x += drop_path(Residual(name="attn_residual")(x, h, y), c.drop_path, training_rng(self))
        h = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="mlp_norm")(x)
        y = dropout(mlp_of(c)(h), c.dropout, training_rng(self))
        x += drop_path(Residual(name="mlp_residual")(x, h, y), c.drop_path, training_rng(self))
        return nn.with_logical_constraint(x, ("batch", "length", None))


def drop_path(y: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """y [B, ...] with whole rows zeroed with probability `rate` and the rest rescaled (arXiv 1603.09382)."""
    if rng is None or rate == 0.0:
        return y
    rows = dropout(jnp.ones((y.shape[0],) + (1,) * (y.ndim - 1), y.dtype), rate, rng)
    return y * rows


class Map(nn.Module):
    """Attention pooling: one learnt query over all tokens, then a residual MLP."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, N, D] -> [B, D]."""
        c = self.config
        t = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        draw = nn.initializers.normal(0.02)
        probe = get_param(self, "probe", draw, (1, c.hidden_size), (None, "embed"), c.param_dtype)
        probe = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, c.hidden_size))
        q, k, v = (
            Linear(c.hidden_size, ("embed", axis), name=name, **t)(source).reshape(*source.shape[:2], c.num_heads, -1)
            for name, axis, source in (("q", "heads", probe), ("k", "kv_heads", x), ("v", "kv_heads", x))
        )
        y = attend(q, k, v, jnp.ones((x.shape[0], 1, x.shape[1]), bool))
        y = Linear(c.hidden_size, ("heads", "embed"), name="o", **t)(y)
        h = LayerNorm(c.norm_eps, param_dtype=c.param_dtype, name="norm")(y)
        return (y + mlp_of(c)(h))[:, 0]


class Vit(nn.Module):
    """The encoder. Applied with a `dropout` rng it trains; without, it evaluates."""

    config: VitConfig

    def setup(self) -> None:
        c = self.config
        if c.pooling not in POOLINGS:
            raise ModelError(f"unknown pooling {c.pooling!r}. Valid: {', '.join(POOLINGS)}.")
        if c.patches < 1 or c.hidden_size % c.num_heads:
            raise ModelError(f"{c.num_heads} heads do not divide the width {c.hidden_size}.")
        self.embed = Embeddings(c)
        self.layers = Block(c) if c.scan else [Block(c) for _ in range(c.num_layers)]
        self.outputs = Outputs(c.num_layers)
        self.norm = LayerNorm(c.norm_eps, param_dtype=c.param_dtype)
        if c.pooling == "map":
            self.map = Map(c)
        if c.num_classes:
            self.head = Linear(c.num_classes, ("embed", None), dtype=c.dtype, param_dtype=c.param_dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """images float [B, H, W, C] -> hidden after the last norm [B, N, D], the class token first where there is one.

        ModelError where the size is not the model's.
        """
        c = self.config
        embedded, slots = self.embed(images)
        seen = slots[:, None, :].astype(bool)
        x, layers = apply_layers(self.layers, c, embedded, seen, collect=self.outputs.occupied)
        tokens = c.patches + (c.pooling == "token")
        x = self.norm(self.outputs(x, layers, embedded, seen)[:, -tokens:])
        if self.is_initializing():
            pooled = self.map(x) if c.pooling == "map" else x[:, 0]
            if c.num_classes:
                self.head(pooled)
        return x

    def features(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, C] -> [B, D] for a task head."""
        x = self(images)
        if self.config.pooling == "map":
            return self.map(x)
        return x[:, 0] if self.config.pooling == "token" else jnp.mean(x, axis=1)

    def logits(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, C] -> [B, num_classes] by the model's own head."""
        if not self.config.num_classes:
            raise ModelError("this model has no head of its own: use a task's, or a configuration with num_classes.")
        return self.head(self.features(images)).astype(jnp.float32)

    def example(self) -> tuple[jax.Array]:
        """Inputs for `init`."""
        c = self.config
        return (jnp.zeros((1, c.image_size, c.image_size, c.channels)),)


def resize_positions(table: jax.Array, size: int, class_token: bool = True) -> jax.Array:
    """A position table [N, D] for `size` x `size` patches, bilinear without anti-aliasing; the class token's row stays.

    ModelError where the rows without the class token's are no square: better than a guess which of them is one.
    """
    first, grid = table[: int(class_token)], table[int(class_token) :]
    side = round(grid.shape[0] ** 0.5)
    if side * side != grid.shape[0]:
        raise ModelError(f"{grid.shape[0]} positions are no square grid: is class_token={class_token} right?")
    if side == size:
        return table
    grid = grid.reshape(side, side, -1)
    grid = jax.image.resize(grid, (size, size, grid.shape[-1]), "bilinear", antialias=False)
    return jnp.concatenate([first, grid.reshape(size * size, -1)])
