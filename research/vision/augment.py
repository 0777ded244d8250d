"""Augmentation: each a pure, jittable function of (key, image float [H, W, C] in [0, 1]).

    key = sample_key(seed, index, epoch);    image = pad_crop(key, flip(key', image), 4)

The key depends on the row and the epoch alone, so that batch size, order and a resumed run change nothing. Mixup and
cutmix take a batch instead, and give labels [B, C] that sum to 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def sample_key(seed: int, index: jax.Array | int, epoch: jax.Array | int) -> jax.Array:
    """The key of one row in one epoch."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), index)


def flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Left and right change places, with probability one half."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def pad_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """A window of the image's own size out of the image with `padding` zeros on each side."""
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """A window of random area (a share in `scale`) and width / height (log-uniform in `ratio`), resized to [S, S, C].

    A window that is longer than the image is cut to it; torchvision draws again, which has no fixed length.
    """
    height, width, depth = image.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = height * width * jax.random.uniform(area_key, (), minval=scale[0], maxval=scale[1])
    log = jax.random.uniform(ratio_key, (), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1]))
    w = jnp.clip(jnp.sqrt(area * jnp.exp(log)), 1.0, width)
    h = jnp.clip(jnp.sqrt(area / jnp.exp(log)), 1.0, height)
    top, left = jax.random.uniform(place_key, (2,)) * jnp.stack([height - h, width - w])
    zoom = size / jnp.stack([h, w])
    shift = -jnp.stack([top, left]) * zoom
    return jax.image.scale_and_translate(image, (size, size, depth), (0, 1), zoom, shift, "bilinear", antialias=True)


def random_erasing(
    key: jax.Array,
    image: jax.Array,
    probability: float = 0.5,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> jax.Array:
    """A random rectangle of noise from U(0, 1) over the image (arXiv 1708.04896)."""
    on_key, area_key, ratio_key, place_key, noise_key = jax.random.split(key, 5)
    height, width = image.shape[:2]
    area = height * width * jax.random.uniform(area_key, (), minval=scale[0], maxval=scale[1])
    log = jax.random.uniform(ratio_key, (), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1]))
    h = jnp.clip(jnp.round(jnp.sqrt(area * jnp.exp(log))), 1, height)
    w = jnp.clip(jnp.round(jnp.sqrt(area / jnp.exp(log))), 1, width)
    top, left = jnp.floor(jax.random.uniform(place_key, (2,)) * jnp.stack([height - h + 1, width - w + 1]))
    inside = rectangle(image.shape[:2], top, left, h, w) & jax.random.bernoulli(on_key, probability)
    return jnp.where(inside[..., None], jax.random.uniform(noise_key, image.shape), image)


def rectangle(shape: tuple[int, int], top: jax.Array, left: jax.Array, h: jax.Array, w: jax.Array) -> jax.Array:
    """bool [H, W], True inside rows top..top+h-1 and columns left..left+w-1."""
    rows, columns = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])[None]
    return (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)


def mixup(key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float = 0.2) -> tuple[jax.Array, jax.Array]:
    """images [B, H, W, C], labels [B, C] -> lam x + (1 - lam) x', with the batch reversed as x' and lam from
    Beta(alpha, alpha), folded to at least one half (arXiv 1710.09412).
    """
    lam = jax.random.beta(key, alpha, alpha)
    lam = jnp.maximum(lam, 1 - lam)
    mix = lambda x: lam * x + (1 - lam) * x[::-1]  # noqa: E731
    return mix(images), mix(labels)


def cutmix(key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """images [B, H, W, C], labels [B, C] -> one rectangle comes from the reversed batch; labels by the area that it
    has in whole pixels (arXiv 1905.04899).
    """
    lam_key, place_key = jax.random.split(key)
    height, width = images.shape[1:3]
    side = jnp.sqrt(1 - jax.random.beta(lam_key, alpha, alpha))
    h, w = jnp.round(side * height), jnp.round(side * width)
    top, left = jnp.floor(jax.random.uniform(place_key, (2,)) * jnp.stack([height - h + 1, width - w + 1]))
    inside = rectangle((height, width), top, left, h, w)
    lam = 1 - jnp.mean(inside.astype(jnp.float32))
    return jnp.where(inside[..., None], images[::-1], images), lam * labels + (1 - lam) * labels[::-1]


# ---------------------------------------------------------------------------------------------------------- RandAugment


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """[H, W, C] read at centre + matrix [2, 2] (row, column) offsets, bilinear, zeros outside."""
    height, width, _ = image.shape
    centre = (jnp.asarray([height, width]) - 1) / 2
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")) - centre[:, None, None]
    at = jnp.einsum("ij,jhw->ihw", matrix, grid) + centre[:, None, None]
    read = lambda channel: map_coordinates(channel, list(at), order=1)  # noqa: E731
    return jax.vmap(read, in_axes=-1, out_axes=-1)(image)


def _rotate(image: jax.Array, m: jax.Array) -> jax.Array:
    sin, cos = jnp.sin(m * jnp.pi / 6), jnp.cos(m * jnp.pi / 6)  # up to 30 degrees
    return affine(image, jnp.stack([cos, -sin, sin, cos]).reshape(2, 2))


def _shear(image: jax.Array, m: jax.Array, row: int) -> jax.Array:
    return affine(image, jnp.eye(2).at[row, 1 - row].set(0.3 * m))


def _shift(image: jax.Array, m: jax.Array, axis: int) -> jax.Array:
    place = jnp.arange(image.shape[axis]) + jnp.round(m * 0.3 * image.shape[axis]).astype(jnp.int32)
    return jnp.take(image, place, axis=axis, mode="fill", fill_value=0.0)


def _contrast(image: jax.Array, m: jax.Array) -> jax.Array:
    return jnp.clip(image.mean() + (1 + 0.9 * m) * (image - image.mean()), 0, 1)


def _sharpness(image: jax.Array, m: jax.Array) -> jax.Array:
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    soft = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image) / 13
    return jnp.clip(soft + (1 + 0.9 * m) * (image - soft), 0, 1)


def _stretch(image: jax.Array, m: jax.Array) -> jax.Array:
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    return jnp.where(high > low, (image - low) / jnp.maximum(high - low, 1e-6), image)


OPERATIONS: tuple[Callable[[jax.Array, jax.Array], jax.Array], ...] = (
    lambda image, m: image,
    _rotate,
    lambda image, m: _shear(image, m, 0),
    lambda image, m: _shear(image, m, 1),
    lambda image, m: _shift(image, m, 0),
    lambda image, m: _shift(image, m, 1),
    lambda image, m: jnp.clip(image * (1 + 0.9 * m), 0, 1),
    _contrast,
    _sharpness,
    _stretch,
    lambda image, m: jnp.where(image < 1 - 0.5 * jnp.abs(m), image, 1 - image),  # solarise
    lambda image, m: (
        jnp.round(image * (2.0 ** (8 - jnp.round(4 * jnp.abs(m))) - 1)) / (2.0 ** (8 - jnp.round(4 * jnp.abs(m))) - 1)
    ),  # posterise
)


def rand_augment(key: jax.Array, image: jax.Array, count: int = 2, magnitude: float = 0.5) -> jax.Array:
    """`count` of the operations, each drawn uniformly and applied with strength +-magnitude in [0, 1]
    (arXiv 1909.13719; its 0..30 scale over 30). Histogram equalising and colour shifts are left out: the sets here are
    grey or drawn.
    """
    for step in jax.random.split(key, count):
        which, sign = jax.random.split(step)
        m = jnp.where(jax.random.bernoulli(sign), magnitude, -magnitude)
        image = jax.lax.switch(jax.random.randint(which, (), 0, len(OPERATIONS)), OPERATIONS, image, m)
    return image
