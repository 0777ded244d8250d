"""Dropout, norms, projections, tables and the stack of layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.bert import Bert
from research.nn.embed import Embed
from research.nn.layers import REMAT
from research.nn.linear import Linear
from research.nn.norm import LayerNorm, RMSNorm
from research.nn.param import dropout
from research.nn.sites import LinearNode
from tests import tiny

X = jax.random.normal(jax.random.key(0), (2, 3, 8))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_mean_and_has_the_variance_of_its_rate(rate):
    n = 400_000
    y = dropout(jnp.ones(n), rate, jax.random.key(0))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-4)
    deviation = np.sqrt(rate * (1 - rate) / n)
    assert abs(kept.mean() - (1 - rate)) < 4 * deviation
    assert abs(y.mean() - 1) < 4 * deviation / (1 - rate)
    np.testing.assert_allclose(y.var(), rate / (1 - rate), rtol=0.05)


def test_dropout_is_the_identity_without_rate_or_rng():
    assert dropout(X, 0.0, jax.random.key(0)) is X
    assert dropout(X, 0.5, None) is X
    assert dropout(X.astype(jnp.bfloat16), 0.5, jax.random.key(0)).dtype == jnp.bfloat16


def test_dropout_near_one_drops_nearly_all():
    y = dropout(jnp.ones(100_000), 0.999999, jax.random.key(0))
    assert np.isfinite(y).all() and (y != 0).mean() < 1e-3


def test_norms():
    x, rng = np.asarray(X) * 5 + 2, np.random.default_rng(0)
    scale, bias = (rng.normal(size=8).astype(np.float32) for _ in range(2))
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1) * scale + bias
    np.testing.assert_allclose(LayerNorm(0.1).apply({"params": {"scale": scale, "bias": bias}}, x), expected, atol=1e-5)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(RMSNorm(0.1).apply({"params": {"scale": scale}}, x), expected, atol=1e-5)


@pytest.mark.parametrize("norm", [LayerNorm(1e-6), RMSNorm(1e-6)])
def test_norms_compute_in_fp32(norm):
    """300^2 + ... overflows fp16, and 256 + 1 is 256 in bf16."""
    x = (256 + jnp.arange(8.0)).astype(jnp.bfloat16)
    params = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    y = norm.apply(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), norm.apply(params, x.astype(jnp.float32)), rtol=0.01)


def test_linear_flattens_and_casts():
    rng = np.random.default_rng(0)
    p = {
        "kernel": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=5), jnp.float32),
    }
    expected = np.asarray(X) @ p["kernel"] + p["bias"]
    np.testing.assert_allclose(Linear(5, ("embed", "mlp")).apply({"params": p}, X), expected, atol=1e-5)
    half = Linear(5, ("embed", "mlp"), dtype="bfloat16").apply({"params": p}, X)
    assert half.dtype == jnp.bfloat16 and half.shape == (2, 3, 5)


class Affine(LinearNode):
    """A node whose three hooks leave different traces."""

    kind = "linear"
    trained = ()
    n: jax.Array

    def input(self, x, rng):
        return x * self.n

    def weight(self, w, rng):
        return w + self.n

    def output(self, x, y, rng):
        return y * self.n + 1


def test_hooks_run_in_the_order_of_the_keys():
    kernel, bias, x = jnp.eye(3), jnp.full(3, 0.5), jnp.arange(6.0).reshape(2, 3)
    peft = {"10_b": Affine(n=jnp.asarray(3.0)), "02_a": Affine(n=jnp.asarray(2.0))}
    y = Linear(3, ("embed", "mlp")).apply({"params": {"kernel": kernel, "bias": bias}, "peft": peft}, x)
    inside = (x * 2 * 3) @ (kernel + 2 + 3) + bias
    np.testing.assert_allclose(y, (inside * 2 + 1) * 3 + 1, atol=1e-4)


def test_embed_looks_up_and_attends():
    table = jax.random.normal(jax.random.key(1), (10, 8))
    module = Embed(10, 8)
    ids = jnp.array([[3, 9], [0, 3]])
    np.testing.assert_array_equal(module.apply({"params": {"embedding": table}}, ids), table[ids])
    logits = module.apply({"params": {"embedding": table}}, X, method="attend")
    np.testing.assert_allclose(logits, X @ table.T, atol=1e-5)
    half = module.apply({"params": {"embedding": table}}, X.astype(jnp.bfloat16), method="attend")
    assert half.dtype == jnp.float32


def test_parameters_carry_logical_axes():
    boxed = Linear(5, ("embed", "mlp")).init(jax.random.key(0), X)["params"]
    assert boxed["kernel"].names == ("embed", "mlp") and boxed["bias"].names == ("mlp",)
    assert nn.unbox(boxed)["kernel"].shape == (8, 5)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", REMAT)
def test_remat_and_scan_are_in_the_program(scan, remat):
    case = tiny.case("linear_probe", "encoder", scan=scan, remat=remat)
    assert isinstance(case.model, Bert)
    data = tiny.batch()
    apply = lambda p: case.model.apply({"params": p}, data["tokens"], data["mask"])  # noqa: E731
    eqns = tiny.equations(jax.make_jaxpr(apply)(tiny.params(case.config)).jaxpr)
    found = [eqn for eqn in eqns if eqn.primitive.name in ("remat2", "checkpoint", "remat")]
    assert len(found) == (0 if remat == "none" else 1 if scan else case.config.num_layers)
    assert all(eqn.params["policy"] is REMAT[remat] and eqn.params["prevent_cse"] != scan for eqn in found)
    assert sum(eqn.primitive.name == "scan" for eqn in eqns) == scan
