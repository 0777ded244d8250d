"""What a denoiser is told beside the image: its time, class and text, as one vector.

    time/{in,out}        sinusoids of the time (arXiv 2006.11239, appendix B) through a small network
    labels/embedding     one row a class, and a last one for no class
    text/{kernel,bias}   a pooled text vector; a row of zeros is no text, and then the bias alone is added

The three are added, as DiT (arXiv 2212.09748) does with the first two. A text joins them as one pooled vector: it needs
no second attention in the blocks, so that both denoisers and every PEFT method take it as they are.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import ModelError
from research.nn.embed import Embed
from research.nn.linear import Linear

MAX_PERIOD = 10_000.0


def frequencies(count: int) -> np.ndarray:
    """10000^(-i / count) for i = 0..count-1, in fp64."""
    return MAX_PERIOD ** -(np.arange(count) / count)


def sinusoids(t: jax.Array, features: int) -> jax.Array:
    """t [B] -> [B, features] fp32: cosines, then sines."""
    angle = t.astype(jnp.float32)[:, None] * frequencies(features // 2).astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbed(nn.Module):
    """Linear, SiLU, Linear over the sinusoids of 1000 t."""

    features: int
    frequencies: int = 256
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """t [B] in [0, 1] -> [B, D]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = sinusoids(1000.0 * t, self.frequencies)
        x = jax.nn.silu(Linear(self.features, (None, "embed"), name="in", **types)(x))
        return Linear(self.features, ("embed", None), name="out", **types)(x)


class Condition(nn.Module):
    """num_classes and text_features are 0 where the model has no classes or takes no text."""

    features: int
    num_classes: int = 0
    text_features: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, t: jax.Array, labels: jax.Array | None, text: jax.Array | None) -> jax.Array:
        """t [B] in [0, 1], labels int [B] (num_classes: no class) or None, text [B, E] or None -> [B, D].

        ModelError for labels or a text that the model can't take.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        c = TimeEmbed(self.features, name="time", **types)(t)
        if self.num_classes:
            labels = jnp.full(t.shape, self.num_classes) if labels is None else labels
            c += Embed(self.num_classes + 1, self.features, (None, "embed"), name="labels", **types)(labels)
        elif labels is not None:
            raise ModelError("labels were given, but the model has no classes: take them away, or set num_classes.")
        if self.text_features:
            text = jnp.zeros((*t.shape, self.text_features)) if text is None else text
            if text.shape[-1] != self.text_features:
                raise ModelError(f"a text vector has {text.shape[-1]} features. Valid: {self.text_features}.")
            c += Linear(self.features, (None, "embed"), name="text", **types)(text)
        elif text is not None:
            raise ModelError("a text was given, but the model takes none: take it away, or set text_features.")
        return c
