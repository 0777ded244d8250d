"""U-Net: zeros at first, halves and doubles, conditions, its convolutions, PEFT."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from research.errors import FlagError, ModelError
from research.models import unet
from research.models.registry import build, preset
from research.nn.conv import Conv, GroupNorm, upsample
from research.peft import method as peft
from research.peft import registry
from tests import tiny
from tests.models.denoisers import CLASSES, TEXT, check_method, inputs

TINY = unet.UnetConfig(
    8, 2, 8, (1, 2), (False, True), head_dim=8, groups=4, num_classes=CLASSES, text_features=TEXT, learn_sigma=True
)
ARGS = inputs(TINY.image_size, TINY.channels)


@functools.cache
def params():
    return tiny.fill(peft.base(build(TINY))[0])


@functools.cache
def compiled(**changes):
    return functools.partial(jax.jit(build(dataclasses.replace(TINY, **changes)).apply), {"params": params()})


@pytest.mark.slow
def test_zeros_at_first():
    model = build(TINY)
    y = jax.jit(lambda rng: model.apply({"params": model.init(rng, *ARGS)["params"]}, *ARGS))(jax.random.key(0))
    assert y.shape == (3, 8, 8, 4)
    assert not np.any(y)


@pytest.mark.slow
@pytest.mark.parametrize("name", unet.PRESETS)
def test_presets_give_back_the_size_and_have_sites_in_attention_and_time_only(name):
    model = build(preset(name))
    shape = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), *model.example()))[0].shape
    assert shape == model.example()[0].shape
    names = {path.rpartition("/")[2] for path, site in peft.sites(model).items() if site.kind == "linear"}
    assert names == {"q", "k", "v", "o", "up", "down", "time", "skip", "in", "out"} | (
        {"text"} if model.config.text_features else set()
    )


@pytest.mark.slow
def test_time_class_and_text_change_the_output():
    run, (x, t, labels, text) = compiled(), ARGS
    base = np.asarray(run(*ARGS))
    for changed in ((x, t + 0.05, labels, text), (x, t, (labels + 1) % CLASSES, text), (x, t, labels, text[::-1] + 1)):
        assert (np.abs(run(*changed) - base).max(axis=(1, 2, 3)) > 1e-3).all()
    nothing = run(x, t, np.full_like(labels, CLASSES), np.zeros_like(text))
    np.testing.assert_allclose(run(x, t), nothing, atol=1e-5)


@pytest.mark.slow
def test_remat_and_half_precision():
    full, half = np.asarray(compiled()(*ARGS)), np.asarray(compiled(dtype="bfloat16")(*ARGS))
    np.testing.assert_allclose(compiled(remat="full")(*ARGS), full, atol=2e-5)
    assert half.dtype == np.float32
    assert np.abs(half - full).mean() < 0.1 * np.abs(full).mean()


def test_a_convolution_is_its_sum():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    for stride in (1, 2):
        conv = Conv(5, stride=stride)
        p = tiny.fill(nn.unbox(conv.init(jax.random.key(0), x)["params"]))
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        moved = lambda i, j: padded[:, i : i + 4 : stride, j : j + 6 : stride]  # noqa: E731, B023
        expected = sum(moved(i, j) @ np.asarray(p["kernel"][i, j]) for i in range(3) for j in range(3)) + p["bias"]
        np.testing.assert_allclose(conv.apply({"params": p}, x), expected, atol=1e-5)


def test_group_norm_and_upsampling():
    x = np.random.default_rng(0).normal(2, 3, size=(2, 4, 6, 8)).astype(np.float32)
    y = np.asarray(GroupNorm(4).init_with_output(jax.random.key(0), x)[0]).reshape(2, 24, 4, 2)
    np.testing.assert_allclose(y.mean(axis=(1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(axis=(1, 3)), 1, atol=1e-4)
    up = np.asarray(upsample(x))
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.testing.assert_array_equal(up[:, i::2, j::2], x)


def test_what_it_refuses():
    x, t, *_ = ARGS
    with pytest.raises(ModelError, match="multiples of 2"):
        jax.eval_shape(build(TINY).init, jax.random.key(0), x[:, :7], t)
    with pytest.raises(ModelError, match="Valid: 1, 2, 4, 8"):
        jax.eval_shape(build(dataclasses.replace(TINY, groups=3)).init, jax.random.key(0), x, t)
    sites = peft.sites(build(TINY))
    for spec in ("prompt", "prefix"):
        with pytest.raises(FlagError, match="embed site"):
            peft.init(registry.parse(spec), jax.random.key(0), sites)


METHODS = ["lora:targets=.*/(q|v|time)", "houlsby:width=4", "ia3", "bitfit", "dora"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", METHODS)
def test_methods_reach_what_they_train(spec):
    check_method(TINY, spec)
