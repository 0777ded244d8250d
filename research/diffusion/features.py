"""The small network whose penultimate activations the Frechet distance compares, and whose classes it counts.

    conv1 -> relu -> halve -> conv2 -> relu -> halve -> hidden -> relu = features [B, F] -> output = logits [B, classes]

It is trained as a classifier (`experiments.features`). Distances of different networks can't be compared: each carries
its weights' hash in its name (`frechet.network_name`).
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.conv import Conv
from research.nn.linear import Linear


@dataclass(frozen=True)
class FeaturesConfig:
    """Images of `image_size` pixels a side; `width` channels, then twice as many; `features` F."""

    image_size: int = 28
    channels: int = 1
    width: int = 16
    features: int = 128
    num_classes: int = 10
    family: str = "features"


class Features(nn.Module):
    """A classifier of two convolutions."""

    config: FeaturesConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images [B, H, W, C] in [-1, 1] -> features [B, F], logits [B, classes], both fp32."""
        c = self.config
        x = _halved(jax.nn.relu(Conv(c.width, name="conv1")(images)))
        x = _halved(jax.nn.relu(Conv(2 * c.width, name="conv2")(x)))
        x = x.reshape(len(x), -1)
        std = (2 / x.shape[-1]) ** 0.5
        x = jax.nn.relu(Linear(c.features, (None, "embed"), init_std=std, name="hidden")(x))
        return x, Linear(c.num_classes, ("embed", None), name="output")(x).astype(jnp.float32)

    def example(self) -> tuple[jax.Array]:
        """Inputs of the right shapes, for `init`."""
        c = self.config
        return (jnp.zeros((1, c.image_size, c.image_size, c.channels)),)


def _halved(x: jax.Array) -> jax.Array:
    """x [B, H, W, C] -> [B, H / 2, W / 2, C], the largest of each four."""
    return nn.max_pool(x, (2, 2), (2, 2))
