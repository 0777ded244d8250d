"""The vision transformer against published counts and its own symmetries."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.convert.config_vision import vit_to_hf
from research.errors import ModelError
from research.models import stack, vit
from research.models.registry import build, preset
from research.nn.mlp import ACTIVATIONS
from research.nn.param import dropout
from research.peft import method as peft
from research.peft import registry, tree
from tests import tiny

TINY = vit.VitConfig(8, 4, 3, 32, 2, 4, 56)


def images(rows: int = 4, size: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, size, size, channels)).astype(np.float32)


@functools.cache
def params(config: vit.VitConfig) -> dict:
    return tiny.fill(peft.base(build(config))[0])


@functools.cache
def forward(config: vit.VitConfig, method: str = "__call__"):
    return jax.jit(lambda p, x: build(config).apply({"params": p}, x, method=method))


@pytest.mark.parametrize(("name", "count"), [
    ("vit-ti16", 5717416), ("vit-s16", 22050664), ("vit-s32", 22878952), ("vit-b16", 86567656), ("vit-b32", 88224232),
    ("vit-l16", 304326632), ("vit-l32", 306535400), ("vit-h14", 632045800),
])  # fmt: skip
def test_published_counts_with_1000_classes(name, count):
    assert tree.count(peft.base(build(preset(name)))[0]) == count


@pytest.mark.parametrize(("name", "changes", "count"), [
    ("vit-b16", {"patch": 8, "num_classes": 1000}, 86576872), ("vit-b16", {"num_classes": 0}, 85798656),
    ("vit-b16", {"pooling": "gap"}, 86566120), ("vit-s16", {"pooling": "gap"}, 22049896),
    ("vit-l16", {"num_classes": 0}, 303301632), ("vit-h14", {"num_classes": 0}, 630764800),
])  # fmt: skip
def test_published_counts_of_variants(name, changes, count):
    assert tree.count(peft.base(build(dataclasses.replace(preset(name), **changes)))[0]) == count


def test_options_of_clips_tower():
    plain, clip = (
        tree.count(params(dataclasses.replace(TINY, **x))) for x in ({}, {"pre_norm": True, "patch_bias": False})
    )
    assert clip == plain + 2 * 32 - 32
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](jnp.float32(2.0)), 2 / (1 + np.exp(-3.404)), rtol=1e-6)


@pytest.mark.parametrize(("spec", "count"), [
    ("bitfit", 102912), ("vpt:length=50,deep=False", 38400), ("vpt:length=10", 92160), ("vpt:length=50", 460800),
    ("lora:rank=8,targets=attn/(q|v)", 294912), ("lora:rank=8,targets=all", 1327104), ("adaptformer", 1189632),
])  # fmt: skip
def test_published_trainable_counts_on_b16(spec, count):
    module = build(dataclasses.replace(preset("vit-b16"), num_classes=0))
    method, sites = registry.parse(spec), peft.sites(module)
    added = jax.eval_shape(lambda: peft.init(method, jax.random.key(0), sites))
    variables = {"params": peft.base(module)[0], "peft": added}
    assert tree.count(variables, peft.mask(method, variables)) == count


@pytest.mark.parametrize("pooling", ["token", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gap", "map"))])
def test_shapes_and_own_head(pooling):
    config = dataclasses.replace(TINY, pooling=pooling, num_classes=5)
    hidden = forward(config)(params(config), images())
    assert hidden.shape == (4, 4 + (pooling == "token"), 32)
    assert forward(config, "logits")(params(config), images()).shape == (4, 5)
    features = forward(config, "features")(params(config), images())
    if pooling != "map":
        expected = hidden[:, 0] if pooling == "token" else np.mean(hidden, axis=1)
        np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.slow
def test_scanned_equals_unrolled():
    flat = dataclasses.replace(TINY, scan=False)
    whole = forward(TINY)(params(TINY), images())
    np.testing.assert_allclose(forward(flat)(stack.unstack(params(TINY)), images()), whole, atol=1e-5)


def test_without_positions_the_order_of_patches_is_lost():
    p = params(TINY)
    unplaced = p | {"embed": p["embed"] | {"positions": {"embedding": jnp.zeros((5, 32))}}}
    x = images()
    turned = np.concatenate([x[:, 4:], x[:, :4]], axis=1)  # its rows of patches change places
    a, b = (forward(TINY)(unplaced, image) for image in (x, turned))
    np.testing.assert_allclose(a[:, 0], b[:, 0], atol=1e-5)
    np.testing.assert_allclose(a[:, 1:3], b[:, 3:5], atol=1e-5)
    assert np.abs(forward(TINY)(p, x)[:, 0] - forward(TINY)(p, turned)[:, 0]).max() > 1e-2


def test_a_stem_is_strided_convolutions_each_with_a_norm_and_a_gelu():
    config = dataclasses.replace(TINY, image_size=7, patch=1, stem=(4, 6), patch_bias=False)
    p, x = params(config), images(size=7)
    assert config.patches == 4  # 7 -> 4 -> 2 a side
    assert tree.count(p["embed"]["stem_0"]) == 9 * 3 * 4 + 3 * 4 and p["embed"]["patches"]["kernel"].shape == (6, 32)
    found = build(config).apply({"params": p}, x, method=lambda m, images: m.embed(images)[0])
    y = x
    for stage in (p["embed"]["stem_0"], p["embed"]["stem_1"]):
        kernel, padded = np.asarray(stage["conv"]["kernel"]), np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        places = range(0, y.shape[1], 2)
        rows = [[np.einsum("bhwc,hwcd->bd", padded[:, i : i + 3, j : j + 3], kernel) for j in places] for i in places]
        y = np.stack([np.stack(row, axis=1) for row in rows], axis=1) + stage["conv"]["bias"]
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + config.norm_eps)
        y = np.asarray(jax.nn.gelu(y * stage["norm"]["scale"] + stage["norm"]["bias"]))
    tokens = y.reshape(4, 4, 6) @ p["embed"]["patches"]["kernel"] + p["embed"]["positions"]["embedding"][1:]
    np.testing.assert_allclose(found[:, 1:], tokens, atol=1e-5)
    assert not [site for site in peft.sites(build(config)) if "stem" in site]
    with pytest.raises(ModelError, match="no place for convolutions in front of the patches"):
        vit_to_hf(config)


def test_position_resize():
    table = np.random.default_rng(0).normal(size=(17, 8)).astype(np.float32)
    np.testing.assert_array_equal(vit.resize_positions(table, 4), table)
    bigger = vit.resize_positions(table, 8)
    assert bigger.shape == (65, 8)
    np.testing.assert_array_equal(bigger[0], table[0])
    ramp = np.arange(4.0, dtype=np.float32).repeat(4)[:, None]  # linear along the rows: inside it stays linear
    inner = np.asarray(vit.resize_positions(ramp, 8, class_token=False)).reshape(8, 8)[1:-1, 0]
    np.testing.assert_allclose(np.diff(inner), 0.5, atol=1e-6)
    with pytest.raises(ModelError, match="16 positions|no square"):
        vit.resize_positions(table[:16], 4)


def test_drop_path_leaves_out_whole_rows():
    y = jnp.ones((4000, 3))
    kept = vit.drop_path(y, 0.25, jax.random.key(0))
    rows = np.asarray(kept[:, 0])
    np.testing.assert_array_equal(kept, rows[:, None].repeat(3, 1))
    assert {round(float(x), 2) for x in np.unique(rows)} == {0.0, 1.33} and abs((rows > 0).mean() - 0.75) < 0.03
    assert vit.drop_path(y, 0.25, None) is y and dropout(y, 0.0, jax.random.key(0)) is y


def test_bad_shapes_are_named():
    with pytest.raises(ModelError, match=r"patch 3 does not divide image size 8. Valid: 1, 2, 4, 8"):
        peft.base(build(dataclasses.replace(TINY, patch=3)))
    with pytest.raises(ModelError, match=r"patch 3 does not divide what the stem leaves, 4. Valid: 1, 2, 4"):
        peft.base(build(dataclasses.replace(TINY, patch=3, stem=(4,))))
    with pytest.raises(ModelError, match="unknown pooling"):
        peft.base(build(dataclasses.replace(TINY, pooling="mean")))
    with pytest.raises(ModelError, match="resize them"):
        build(TINY).apply({"params": params(TINY)}, images(size=12))
