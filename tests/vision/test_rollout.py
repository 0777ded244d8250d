"""Attention rollout: what the class token reads, by definition and where it is known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.registry import build
from research.models.vit import VitConfig
from research.peft import method as peft
from research.peft import registry
from research.vision.rollout import rollout
from tests import tiny

TINY = VitConfig(8, 4, 1, 32, 2, 4, 56)
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)


def test_where_all_tokens_are_alike_every_patch_has_the_same_share():
    params = tiny.params(TINY)
    q = {"kernel": jnp.zeros((2, 32, 32)), "bias": jnp.zeros((2, 32))}
    params = params | {"layers": params["layers"] | {"attn": params["layers"]["attn"] | {"q": q}}}
    found = jax.jit(lambda p: rollout(build(TINY), {"params": p}, IMAGES))(params)
    np.testing.assert_allclose(found, np.full((3, 2, 2), 0.25), atol=1e-6)


def test_one_layer_is_its_own_attention_and_prompts_have_no_place():
    config = replace(TINY, num_layers=1)
    model, params = build(config), tiny.params(config)
    found = np.asarray(jax.jit(lambda p: rollout(model, {"params": p}, IMAGES))(params))
    x, _ = model.apply({"params": params}, IMAGES, method=lambda m, images: m.embed(images))
    x, layer = np.asarray(x), jax.tree.map(lambda leaf: np.asarray(leaf[0]), params["layers"])
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
    h = h * layer["attn_norm"]["scale"] + layer["attn_norm"]["bias"]
    q, k = ((h @ layer["attn"][n]["kernel"] + layer["attn"][n]["bias"]).reshape(3, 5, 4, 8) for n in "qk")
    weights = np.exp(np.einsum("bhd,bkhd->bhk", q[:, 0], k) / 8**0.5)
    first = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)[:, 1:]
    np.testing.assert_allclose(found.reshape(3, 4), first / first.sum(axis=1, keepdims=True), atol=1e-5)
    method, sites = registry.parse("vpt:length=3"), peft.sites(model)
    added = {"params": params, "peft": peft.init(method, jax.random.key(0), sites)}
    with_prompts = jax.jit(lambda v: rollout(model, v, IMAGES))(peft.realised(method, added, sites))
    np.testing.assert_allclose(with_prompts, found, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"pooling": "token"}, {"pooling": "gap"}, {"pooling": "map"}, {"patch": 1, "stem": (4, 8)}]
)
def test_every_pooling_and_virtual_tokens_and_a_stem_give_a_map(options):
    config = replace(TINY, **options)
    model = build(config)
    method, sites = registry.parse("vpt:length=3,deep=False"), peft.sites(model)
    variables = {"params": tiny.params(config), "peft": peft.init(method, jax.random.key(0), sites)}
    found = jax.jit(lambda v: rollout(model, v, IMAGES))(peft.realised(method, variables, sites))
    assert found.shape == (3, 2, 2) and (np.asarray(found) > 0).all()
    np.testing.assert_allclose(found.sum(axis=(1, 2)), 1, atol=1e-6)
