"""Attention by name: splash, interpreted, is xla to rounding, whatever the mask was made from; what is not for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.convert.load import load
from research.errors import FlagError
from research.models.registry import build
from research.nn.kernels import fused
from research.peft import method as peft
from research.peft import registry
from research.train import mesh as meshes
from tests import tiny

ROWS, LENGTH = 4, 20
REAL = np.asarray([20, 13, 7, 16])
AT = np.arange(LENGTH)
SHORT = REAL[:, None] > AT
MASKS = {"right": SHORT, "left": SHORT[:, ::-1], "packed": SHORT}


def losses(spec: str, window: int | None, padding: str) -> tuple[list[Callable], dict]:
    """The same loss through xla and through splash, of base and added parameters; and those."""
    base = load("smoke-llama")
    more = {"sliding_window": window, "family": "mistral"} if window else {}
    config, params = dataclasses.replace(base.config, **more), base.params
    models = [build(dataclasses.replace(config, kernel=name)) for name in ("xla", "splash")]
    method, sites = registry.parse(spec), peft.sites(models[0])
    added = tiny.noise(peft.init(method, jax.random.key(0), sites), std=0.3, seed=1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(5, 50, (ROWS, LENGTH)), jnp.int32)
    mask = MASKS[padding].astype(np.int32)
    segments = np.where(mask, 1 + (AT >= 5) + (AT >= 11), 0).astype(np.int32) if padding == "packed" else None

    def loss(model: Any) -> Callable:
        def fn(params: dict, added: dict) -> jax.Array:
            variables = peft.realised(method, {"params": params, "peft": added}, sites)
            z = model.apply(variables, tokens, jnp.asarray(mask), segments, method="logits")
            return jnp.sum(jnp.where(mask[..., None] > 0, z, 0.0) ** 2) / 1e3

        return fn

    return [loss(model) for model in models], {"params": params, "added": added}


def agree(fns: list[Callable], given: dict, fused_calls: bool = True) -> None:
    """Values and gradients, and whether the second really is another program."""
    text = [str(jax.make_jaxpr(fn)(**given)) for fn in fns]
    assert ["pallas" in t for t in text] == [False, fused_calls]
    (one, grads), (two, others) = (
        jax.jit(jax.value_and_grad(fn, argnums=(0, 1), allow_int=True))(given["params"], given["added"]) for fn in fns
    )
    assert float(two) == pytest.approx(float(one), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        if a.dtype == jnp.float32:
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(1 + jnp.max(jnp.abs(a))))


@pytest.mark.slow
def test_splash_is_xla():
    agree(*losses("lora:rank=2", None, "left"))


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["right", "packed"])
@pytest.mark.parametrize("window", [None, 5])
def test_windows_documents_and_padding(padding: str, window: int | None):
    agree(*losses("lora:rank=2", window, padding))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["prefix:length=3", "prompt:length=3"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_virtual_keys_and_tokens_stand_in_front(spec: str, padding: str):
    agree(*losses(spec, None, padding))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "window", "padding"),
    [("prefix:length=3", None, "packed"), ("prompt:length=3", None, "packed"), ("prompt:length=3", 5, "left")],
)
def test_what_is_not_for_it_is_done_by_xla(spec: str, window: int | None, padding: str):
    agree(*losses(spec, window, padding), fused_calls=False)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data:2,fsdp:2,tensor:2", "data:8", "fsdp:2,sequence:4"])
def test_on_a_mesh(spec: str):
    """Four rows go over four devices, not over eight; the length is shared by xla alone."""
    fns, given = losses("lora:rank=2", None, "right")
    alone = jax.jit(fns[0])(**given)
    with meshes.use(meshes.make_mesh(spec)):
        assert ("pallas" in str(jax.make_jaxpr(fns[1])(**given))) == spec.startswith("data:2")
        assert float(jax.jit(fns[1])(**given)) == pytest.approx(float(alone), rel=1e-5)


def test_names_and_devices():
    with pytest.raises(FlagError, match="unknown attention 'splsh'.*Did you mean 'splash'"):
        build(dataclasses.replace(load("smoke-llama").config, kernel="splsh"))
    with pytest.raises(FlagError, match="families of LLaMA and GPT-2: bert has 'xla'"):
        load("smoke", attention="splash")
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(FlagError, match="cudnn.*GPU"):
        fused("cudnn", x, x, x, jnp.ones((1, 2, 2), bool), None, 1.0)
