"""Augmentation and preprocessing: pure functions of a key, with the areas and sums that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.vision import augment, preprocess

IMAGE = np.random.default_rng(0).uniform(size=(8, 8, 1)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), 32)


def test_a_key_is_the_row_and_the_epoch():
    data = lambda *of: jax.random.key_data(augment.sample_key(*of)).tolist()  # noqa: E731
    keys = [data(0, 1, 2), data(0, 2, 1), data(1, 1, 2), data(0, 1, 3)]
    assert len({tuple(key) for key in keys}) == 4 and data(0, jnp.int32(1), jnp.int32(2)) == keys[0]


def test_flip_and_pad_crop():
    flipped = jax.jit(jax.vmap(augment.flip, (0, None)))(KEYS, IMAGE)
    kinds = [np.array_equal(x, IMAGE) + 2 * np.array_equal(x, IMAGE[:, ::-1]) for x in flipped]
    assert set(kinds) == {1, 2}
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[i : i + 8, j : j + 8].tobytes() for i in range(5) for j in range(5)}
    crops = np.asarray(jax.jit(jax.vmap(lambda key: augment.pad_crop(key, IMAGE, 2)))(KEYS))
    assert {x.tobytes() for x in crops} <= windows and len({x.tobytes() for x in crops}) > 8


@pytest.mark.slow
def test_every_function_is_pure_and_keeps_the_range():
    def each(key: jax.Array) -> list[jax.Array]:
        return [
            augment.rand_augment(key, IMAGE, 1, 0.9),
            augment.random_resized_crop(key, IMAGE, 8),
            augment.random_erasing(key, IMAGE),
        ]

    run = jax.jit(jax.vmap(each))
    first, again = run(KEYS), run(KEYS)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == (32, 8, 8, 1) and np.isfinite(a).all() and a.min() >= -1e-5 and a.max() <= 1 + 1e-5
        assert len({x.tobytes() for x in np.asarray(a)}) > 8
    erased = np.asarray(first[2])
    assert {bool((x == IMAGE).all()) for x in erased} == {True, False}


def test_a_full_crop_is_the_image():
    crop = augment.random_resized_crop(KEYS[0], IMAGE, 8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_allclose(crop, IMAGE, atol=1e-5)


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_mixed_labels_sum_to_one_and_say_what_is_there(mix):
    images = np.stack([np.zeros((8, 8, 1)), np.ones((8, 8, 1))]).astype(np.float32)
    mixed, labels = jax.jit(jax.vmap(lambda key: mix(key, images, jnp.eye(2))))(KEYS)
    np.testing.assert_allclose(labels.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(mixed.mean(axis=(2, 3, 4)), labels[:, :, 1], atol=1e-6)  # the share of the ones
    np.testing.assert_allclose(labels[:, 0], labels[:, 1, ::-1], atol=1e-6)
    assert np.ptp(labels[:, 0, 0]) > 0.05


def test_affine_identity_and_quarter_turn():
    np.testing.assert_allclose(augment.affine(IMAGE, jnp.eye(2)), IMAGE, atol=1e-6)
    turned = augment.affine(IMAGE, jnp.array([[0.0, 1.0], [-1.0, 0.0]]))
    np.testing.assert_allclose(turned, np.rot90(IMAGE), atol=1e-5)


def test_preprocessing():
    raw = np.random.default_rng(1).integers(0, 256, (6, 10, 3)).astype(np.uint8)
    assert preprocess.resize(preprocess.to_float(raw), 3).shape == (3, 5, 3)
    np.testing.assert_array_equal(preprocess.centre_crop(jnp.asarray(raw), 4), raw[1:5, 3:7])
    assert preprocess.centre_crop(jnp.asarray(raw), 12).shape == (12, 12, 3)
    mean, std = preprocess.IMAGENET
    out = preprocess.evaluation(jnp.asarray(raw), 6, mean, std)
    np.testing.assert_allclose(out, (raw[:, 2:8] / 255 - mean) / std, atol=1e-5)
    grey = preprocess.channels(jnp.asarray(raw / 255, jnp.float32), 1)
    np.testing.assert_allclose(grey[..., 0], raw / 255 @ [0.299, 0.587, 0.114], atol=1e-5)
    np.testing.assert_array_equal(preprocess.channels(jnp.asarray(IMAGE), 3), np.repeat(IMAGE, 3, axis=2))
