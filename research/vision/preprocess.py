"""From stored images to a model's input: uint8 [H, W, C] -> normalised float [S, S, C], as pure jittable functions.

Shapes are static, values are not: each function maps over a batch with jax.vmap.
"""

import jax
import jax.numpy as jnp

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5,), (0.5,))  # to [-1, 1]: what the first ViT checkpoints want


def to_float(image: jax.Array) -> jax.Array:
    """uint8 of any shape -> float32 in [0, 1]; a float array is returned as it is."""
    return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image


def normalise(image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """float [..., C] -> (image - mean) / std, per channel."""
    return (image - jnp.asarray(mean)) / jnp.asarray(std)


def resize(image: jax.Array, size: int, method: str = "bilinear") -> jax.Array:
    """float [H, W, C] -> the shorter side is `size` and the shape kept, anti-aliased where it shrinks."""
    height, width, channels = image.shape
    short = min(height, width)
    if short == size:
        return image
    shape = (round(height * size / short), round(width * size / short), channels)
    return jax.image.resize(image, shape, method, antialias=True)


def centre_crop(image: jax.Array, size: int) -> jax.Array:
    """[H, W, C] -> its middle [S, S, C], zero padded where it is smaller."""
    height, width = image.shape[:2]
    pad = [(max(0, size - n) // 2, max(0, size - n) - max(0, size - n) // 2) for n in (height, width)]
    image = jnp.pad(image, (*pad, (0, 0)))
    top, left = ((n - size) // 2 for n in image.shape[:2])
    return image[top : top + size, left : left + size]


def channels(image: jax.Array, count: int) -> jax.Array:
    """[H, W, C] with C = 1 or `count` -> [H, W, count]: grey is repeated, and colour made grey by its luma."""
    have = image.shape[-1]
    if have == count:
        return image
    if have == 1:
        return jnp.repeat(image, count, axis=-1)
    return image @ jnp.asarray([[0.299], [0.587], [0.114]], image.dtype)


def evaluation(
    image: jax.Array, size: int, mean: tuple[float, ...], std: tuple[float, ...], crop: float = 1.0
) -> jax.Array:
    """uint8 [H, W, C] -> [S, S, C] without randomness: shorter side to size / crop, middle, normalise."""
    return normalise(centre_crop(resize(to_float(image), round(size / crop)), size), mean, std)
