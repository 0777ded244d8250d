"""DiT: exact counts, zeros at first, a reference in NumPy, layouts, conditions, PEFT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import ModelError
from research.models import dit
from research.models.registry import build, preset
from research.nn.patches import fold, sincos, unfold
from research.peft import method as peft
from research.peft import tree
from tests import tiny
from tests.models.denoisers import CLASSES, TEXT, check_method, inputs

TINY = dit.DitConfig(8, 3, 2, 32, 2, 4, 56, num_classes=CLASSES, text_features=TEXT)
ARGS = inputs(TINY.image_size, TINY.channels)


@functools.cache
def output(**changes) -> np.ndarray:
    config = dataclasses.replace(TINY, **changes)
    params = tiny.params(dataclasses.replace(TINY, scan=config.scan))
    return np.asarray(jax.jit(build(config).apply)({"params": params}, *ARGS))


@pytest.mark.parametrize(
    "name, count",
    [
        ("dit-s2", 32_865_056), ("dit-s4", 32_920_448), ("dit-s8", 33_142_016),
        ("dit-b2", 130_315_808), ("dit-l2", 457_840_672), ("dit-xl2", 674_834_720),
    ],
)  # fmt: skip
def test_published_counts(name, count):
    assert tree.count(peft.base(build(preset(name)))[0]) == count


def test_zeros_at_first():
    model = build(TINY)
    y = jax.jit(lambda rng: model.apply({"params": model.init(rng, *ARGS)["params"]}, *ARGS))(jax.random.key(0))
    assert y.shape == (3, 8, 8, 6)
    assert not np.any(y)


def reference(p: dict, x, t, labels, text) -> np.ndarray:
    """The paper's equations in float64, one image and one head at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    linear = lambda w, h: h @ w["kernel"] + w["bias"]  # noqa: E731
    silu = lambda h: h / (1 + np.exp(-h))  # noqa: E731
    gelu = lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))  # noqa: E731
    norm = lambda h: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)  # noqa: E731
    size, patch, d, heads = TINY.image_size, TINY.patch, TINY.hidden_size, TINY.num_heads
    side, head = size // patch, d // heads
    rates = 10000.0 ** -(np.arange(d // 4) / (d // 4))
    places = [(r, c) for r in range(side) for c in range(side)]
    waves = lambda place: np.concatenate([np.sin(place * rates), np.cos(place * rates)])  # noqa: E731
    table = [np.concatenate([waves(c), waves(r)]) for r, c in places]
    outputs = []
    for image, time, label, words in zip(x.astype(np.float64), t, labels, text, strict=True):
        angle = 1000.0 * float(time) * 10000.0 ** -(np.arange(128) / 128)
        c = p["condition"]
        h = silu(linear(c["time"]["in"], np.concatenate([np.cos(angle), np.sin(angle)])))
        c = silu(linear(c["time"]["out"], h) + c["labels"]["embedding"][label] + linear(c["text"], words))
        cut = lambda r, k: (slice(r * patch, (r + 1) * patch), slice(k * patch, (k + 1) * patch))  # noqa: E731
        h = np.stack([image[cut(r, k)].reshape(-1) for r, k in places])
        h = linear(p["embed"]["patches"]["project"], h) + np.stack(table)
        for i in range(TINY.num_layers):
            w = p[f"layers_{i}"]
            s1, m1, g1, s2, m2, g2 = linear(w["modulation"], c).reshape(6, d)
            z = norm(h) * (1 + m1) + s1
            q, k, v = (linear(w["attn"][name], z) for name in "qkv")
            mixed = []
            for n in range(heads):
                own = slice(n * head, (n + 1) * head)
                scores = np.exp(q[:, own] @ k[:, own].T / np.sqrt(head))
                mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, own])
            h = h + g1 * linear(w["attn"]["o"], np.concatenate(mixed, -1))
            z = norm(h) * (1 + m2) + s2
            h = h + g2 * linear(w["mlp"]["down"], gelu(linear(w["mlp"]["up"], z)))
        shift, scale = linear(p["final"]["modulation"], c).reshape(2, d)
        h = linear(p["final"]["project"], norm(h) * (1 + scale) + shift)
        out = np.zeros((size, size, 2 * TINY.channels))
        for (r, k), tile in zip(places, h, strict=True):
            out[cut(r, k)] = tile.reshape(patch, patch, -1)
        outputs.append(out)
    return np.stack(outputs)


def test_it_is_the_written_reference():
    expected = reference(tiny.params(dataclasses.replace(TINY, scan=False)), *ARGS)
    np.testing.assert_allclose(output(), expected, atol=1e-4 * np.abs(expected).max())


def test_every_layout_gives_the_same():
    for changes in ({"scan": False}, {"remat": "full"}):
        np.testing.assert_allclose(output(**changes), output(), atol=2e-5)


def test_half_precision():
    half, full = output(dtype="bfloat16"), output()
    assert half.dtype == np.float32
    assert np.abs(half - full).mean() < 0.05 * np.abs(full).mean()


def test_time_class_and_text_change_the_output():
    run = functools.partial(jax.jit(build(TINY).apply), {"params": tiny.params(TINY)})
    x, t, labels, text = ARGS
    base = output()
    for changed in ((x, t + 0.05, labels, text), (x, t, (labels + 1) % CLASSES, text), (x, t, labels, text[::-1] + 1)):
        assert (np.abs(run(*changed) - base).max(axis=(1, 2, 3)) > 1e-3).all()
    nothing = run(x, t, np.full_like(labels, CLASSES), np.zeros_like(text))
    np.testing.assert_allclose(run(x, t), nothing, atol=1e-5)


def test_what_a_model_can_not_take():
    model = build(dataclasses.replace(TINY, num_classes=0, text_features=0))
    x, t, labels, text = ARGS
    for args, words in (
        ((x, t, labels), "no classes"),
        ((x, t, None, text), "takes none"),
        ((x[:, :7], t), "Valid: 1"),
    ):
        with pytest.raises(ModelError, match=words):
            jax.eval_shape(model.init, jax.random.key(0), *args)
    with pytest.raises(ModelError, match="Valid: 6"):
        jax.eval_shape(build(TINY).init, jax.random.key(0), x, t, labels, text[:, :4])


def test_patches_come_back_and_positions_differ():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 9, 2)))
    patches = unfold(images, 3)
    np.testing.assert_array_equal(patches[0, 4], images[0, 3:6, 3:6].reshape(-1))
    np.testing.assert_array_equal(fold(patches, 3, 6, 9), images)
    table = sincos(3, 4, 16)
    np.testing.assert_allclose((table**2).sum(axis=1), 8, rtol=1e-6)
    assert len(np.unique(table.round(5), axis=0)) == 12
    with pytest.raises(ModelError, match="multiple of 4"):
        sincos(3, 4, 18)


METHODS = [
    "lora:targets=all",
    "houlsby:width=4",
    "prompt:length=3",
    "ia3",
    "bitfit",
    "prefix:length=3,hidden=8",
    "dora",
]


@pytest.mark.parametrize("spec", [METHODS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_methods_reach_what_they_train(spec):
    check_method(TINY, spec)
