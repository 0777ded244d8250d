"""CLIP's two towers: counts, sites in both, and where a text is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import clip
from research.models.registry import build, preset
from research.peft import method as peft
from research.peft import registry, tree
from research.tasks import contrastive
from tests import tiny

TEXT = {"width": 24, "layers": 3, "heads": 3, "hidden": 40, "vocab": 50, "length": 12}
TINY = clip.ClipConfig(clip.text_tower(**TEXT), clip.vision_tower(32, 2, 4, 56, 4, 8), 16, eos_token_id=49)
MODEL = build(TINY)


def batch(rows: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 49, (rows, 6)).astype(np.int32)
    tokens[:, -1] = 49
    return {
        "images": draw.normal(size=(rows, 8, 8, 3)).astype(np.float32), "tokens": tokens,
        "mask": np.ones_like(tokens),
    }  # fmt: skip


# transformers' own CLIPModel counts these without weights: tests/golden/make_hf_golden.py --counts.
@pytest.mark.parametrize(("name", "count"), [
    ("clip-vit-b32", 151277313), ("clip-vit-b16", 149620737), ("clip-vit-l14", 427616513),
    ("clip-vit-l14-336", 427944193),
])  # fmt: skip
def test_counts_are_those_of_transformers(name, count):
    assert tree.count(peft.base(build(preset(name)))[0]) == count


@pytest.mark.slow
def test_a_method_sits_in_both_towers_and_starts_from_the_base():
    params, sites = tiny.fill(peft.base(MODEL)[0]), peft.sites(MODEL)
    kinds = {(path.split("/")[0], site.kind) for path, site in sites.items()}
    everywhere = ("linear", "residual", "attention", "embed", "output")
    assert {(tower, kind) for tower in ("text", "vision") for kind in everywhere} <= kinds
    method = registry.parse("lora:rank=2+adaptformer:width=4")
    added = peft.init(method, jax.random.key(0), sites)
    for tower in ("text", "vision"):
        assert set(added[tower]["layers"]) >= {"attn"}
    loss = contrastive.loss(MODEL)
    run = jax.jit(jax.value_and_grad(lambda added, data: loss({"params": params, "peft": added}, data, None).mean()))
    fresh, _ = run(added, batch())
    bare = jax.jit(lambda data: loss({"params": params}, data, None).mean())(batch())
    np.testing.assert_allclose(fresh, bare, atol=1e-6)  # step 0 is the base
    moved = tiny.noise(added)
    at_moved, gradient = run(moved, batch())
    assert abs(float(at_moved) - float(bare)) > 1e-3
    mask = peft.mask(method, {"params": params, "peft": moved})["peft"]
    still = [
        path for path, g in tree.paths(gradient).items()
        if tree.trains(tree.paths(mask)[path]) and not np.abs(g).max() > 0
    ]  # fmt: skip
    assert not still, "every trained leaf of both towers has a say"


def test_the_end_of_a_text():
    tokens = jnp.array([[5, 49, 49, 49], [7, 8, 3, 0], [49, 2, 3, 4], [0, 0, 6, 49]])
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(clip.end(tokens, mask, 49), [1, 2, 0, 3])
    np.testing.assert_array_equal(clip.end(tokens, mask, clip.FIRST_EOS), [1, 1, 0, 3])


def test_what_stands_behind_the_end_changes_nothing():
    params, data = tiny.fill(peft.base(MODEL)[0]), batch()
    texts = jax.jit(lambda tokens: MODEL.apply({"params": params}, tokens, method="texts"))
    longer = np.concatenate([data["tokens"], np.full((3, 2), 49)], axis=1)
    other = np.concatenate([data["tokens"], np.full((3, 2), 9)], axis=1)
    np.testing.assert_allclose(texts(longer), texts(other), atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(texts(longer), axis=-1), 1, atol=1e-6)
