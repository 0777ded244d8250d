"""CLIP (arXiv 2103.00020, section 2.3): a text and an image tower, projected to one space where a pair is near.

    text/...   a GPT-2 with quick_gelu and no output of its own     vision/...   a ViT with a norm before its layers
    text_projection, visual_projection (kernels [D, E], no bias), logit_scale []

    i = unit(visual_projection(class token)),  t = unit(text_projection(end token)),  logits = exp(logit_scale) i t'

The towers are `gpt2.Gpt2` and `vit.Vit`: every site of theirs is one here, under `text/` and `vision/`. An image's
feature for a task head is i, so that a head whose kernel is made of prompts classifies without training
(`research.tasks.contrastive.zero_shot`).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models.gpt2 import Gpt2, Gpt2Config
from research.models.vit import Vit, VitConfig
from research.nn.linear import Linear
from research.nn.param import get_param

_TOWER = {"norm_eps": 1e-5, "activation": "quick_gelu", "family": "clip"}
FIRST_EOS = 2  # what the first files call the end; it is then the highest number in a row


def text_tower(
    width: int, layers: int, heads: int, hidden: int, vocab: int = 49408, length: int = 77, **more: Any
) -> Gpt2Config:
    """The configuration of a text tower; `more` are further fields of Gpt2Config."""
    options = _TOWER | {"dropout": 0.0, "attention_dropout": 0.0} | more
    return Gpt2Config(vocab, width, layers, heads, hidden, length, **options)


def vision_tower(
    width: int, layers: int, heads: int, hidden: int, patch: int, size: int = 224, **more: Any
) -> VitConfig:
    """The configuration of an image tower; `more` are further fields of VitConfig."""
    options = _TOWER | {"pre_norm": True, "patch_bias": False, "channels": 3} | more
    sizes = {"hidden_size": width, "num_layers": layers, "num_heads": heads, "intermediate_size": hidden}
    return VitConfig(size, patch, **sizes, **options)


@dataclass(frozen=True)
class ClipConfig:
    """Shapes and options.

    text, vision: the towers' own, but for what follows here: dtype, param_dtype, scan and remat are of the whole.
    projection: E. eos_token_id: of the token that a text is read at; 2 stands for the highest number in the row.
    logit_scale: what a fresh one starts from, ln(1 / 0.07).
    """

    text: Gpt2Config = field(default_factory=lambda: text_tower(512, 12, 8, 2048))
    vision: VitConfig = field(default_factory=lambda: vision_tower(768, 12, 12, 3072, 32))
    projection: int = 512
    eos_token_id: int = 49407
    logit_scale: float = 2.6592
    family: str = "clip"
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: str = "none"

    @property
    def hidden_size(self) -> int:
        """Of an image's feature."""
        return self.projection

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    def towers(self) -> tuple[Gpt2Config, VitConfig]:
        """Both as they are computed."""
        own = {name: getattr(self, name) for name in ("dtype", "param_dtype", "scan", "remat")}
        return replace(self.text, **own), replace(self.vision, **own)


_B, _L = (512, 12, 8, 2048), (768, 12, 12, 3072)
PRESETS = {
    "clip-vit-b32": ClipConfig(),
    "clip-vit-b16": ClipConfig(text_tower(*_B), vision_tower(768, 12, 12, 3072, 16)),
    "clip-vit-l14": ClipConfig(text_tower(*_L), vision_tower(1024, 24, 16, 4096, 14), 768),
    "clip-vit-l14-336": ClipConfig(text_tower(*_L), vision_tower(1024, 24, 16, 4096, 14, 336), 768),
}


class Clip(nn.Module):
    """Both towers. Applied with a `dropout` rng it trains; without, it evaluates."""

    config: ClipConfig

    def setup(self) -> None:
        c = self.config
        text, vision = c.towers()
        self.text, self.vision = Gpt2(text), Vit(vision)
        options = {"use_bias": False, "dtype": c.dtype, "param_dtype": c.param_dtype}
        self.text_projection = Linear(c.projection, ("embed", None), **options)
        self.visual_projection = Linear(c.projection, ("embed", None), **options)
        start = nn.initializers.constant(c.logit_scale)
        self.log_scale = get_param(self, "logit_scale", start, (), (), c.param_dtype)

    def __call__(self, images: jax.Array, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """images float [B, H, W, C]; tokens, mask (1 real, 0 pad) int [M, T] -> logits [B, M] fp32."""
        return jnp.exp(self.scale()) * self.features(images) @ self.texts(tokens, mask).T

    def features(self, images: jax.Array) -> jax.Array:
        """images float [B, H, W, C] -> unit vectors [B, E] fp32."""
        return unit(self.visual_projection(self.vision.features(images)))

    def texts(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """tokens, mask int [B, T] -> unit vectors [B, E] fp32.

        Read at the first end token, which has seen the whole text; at the last real token where there is none, as in a
        text that was cut. ModelError for more tokens than positions.
        """
        mask = jnp.ones_like(tokens) if mask is None else mask
        place = end(tokens, mask, self.config.eos_token_id)
        x = jnp.take_along_axis(self.text(tokens, mask), place[:, None, None], axis=1)[:, 0]
        return unit(self.text_projection(x))

    def scale(self) -> jax.Array:
        """The logarithm of what cosines are multiplied by [], fp32."""
        return self.log_scale.astype(jnp.float32)

    def example(self) -> tuple[jax.Array, jax.Array]:
        """Inputs for `init`."""
        c = self.config.vision
        return jnp.zeros((1, c.image_size, c.image_size, c.channels)), jnp.zeros((1, 2), jnp.int32)


def end(tokens: jax.Array, mask: jax.Array, eos: int) -> jax.Array:
    """tokens, mask int [B, T] -> the index of each row's end token [B]."""
    if eos == FIRST_EOS:
        return jnp.argmax(jnp.where(mask > 0, tokens, -1), axis=1)
    found = (tokens == eos) & (mask > 0)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.where(jnp.any(found, axis=1), jnp.argmax(found, axis=1), last)


def unit(x: jax.Array) -> jax.Array:
    """x [..., E] -> x / |x| in fp32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
