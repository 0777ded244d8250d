"""Losses against sums over rows and tokens in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.tasks import classify
from research.tasks.loss import cross_entropy, model_variables
from tests import tiny


def nats(logits: np.ndarray, label: int) -> float:
    z = np.asarray(logits, np.float64)
    return float(np.log(np.exp(z - z.max()).sum()) + z.max() - z[label])


def test_cross_entropy():
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(3, 4, 7)) * 5, rng.integers(0, 7, (3, 4))
    expected = [[nats(z[i, j], labels[i, j]) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(cross_entropy(jnp.asarray(z), jnp.asarray(labels)), expected, atol=1e-5, rtol=1e-5)
    huge = cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    np.testing.assert_allclose(huge, [2e4])
    assert cross_entropy(jnp.zeros((1, 8), jnp.bfloat16), jnp.array([3])).dtype == jnp.float32


def test_classification_weighs_rows():
    case, data = tiny.case("linear_probe", "encoder"), tiny.batch()
    z = np.asarray(classify.logits(case.model, case.variables, data))
    features = case.model.apply({"params": case.variables["params"]}, data["tokens"], data["mask"], method="features")
    head = case.variables["head"]
    np.testing.assert_allclose(z, features @ head["kernel"] + head["bias"], atol=1e-5)
    loss = jax.jit(lambda d: case.loss(case.variables, d, None))
    out = loss(data)
    each = np.array([nats(row, label) for row, label in zip(z, data["labels"], strict=True)])
    np.testing.assert_allclose(out.sum, (each * data["weight"]).sum(), rtol=1e-5)
    right = (z.argmax(1) == data["labels"]) * data["weight"]
    assert out.weight == data["weight"].sum()
    np.testing.assert_allclose(out.metrics["accuracy"], (right.sum(), data["weight"].sum()))
    whole = case.loss(case.variables, {k: v for k, v in data.items() if k != "weight"}, None)
    assert whole.weight == tiny.ROWS
    np.testing.assert_allclose(whole.sum, each.sum(), rtol=1e-5)


def test_a_row_of_weight_zero_counts_nothing():
    case, data = tiny.case("linear_probe", "encoder"), tiny.batch()
    cut = data | {"weight": data["weight"] * (np.arange(tiny.ROWS) > 0)}
    other = cut | {"tokens": np.where(np.arange(tiny.ROWS)[:, None] > 0, cut["tokens"], 5), "labels": cut["labels"] * 0}
    other["labels"] = np.where(np.arange(tiny.ROWS) > 0, cut["labels"], 0)
    loss = jax.jit(lambda d: case.loss(case.variables, d, None))
    a, b = loss(cut), loss(other)
    assert a.sum == b.sum and a.metrics["accuracy"][0] == b.metrics["accuracy"][0]


def test_the_head_starts_small_and_drops_in_training():
    head = classify.init_head(jax.random.key(0), 512, 3)
    assert head["kernel"].shape == (512, 3) and head["bias"].shape == (3,) and not head["bias"].any()
    assert abs(head["kernel"].std() - 0.02) < 0.002
    case = tiny.case("linear_probe", "encoder", dropout=0.5)
    draw = jax.jit(lambda key: classify.logits(case.model, case.variables, tiny.batch(), key))
    one, again, two = (draw(jax.random.key(k)) for k in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, two)


@pytest.mark.parametrize("masked", [False, True])
def test_language_modelling_predicts_the_next_real_token(masked):
    case = tiny.case("full", "decoder")
    data = {k: tiny.batch()[k] for k in ("tokens", "mask")}
    if masked:
        data["loss_mask"] = np.random.default_rng(1).integers(0, 2, data["mask"].shape) * data["mask"]
    z = case.forward(case.variables, data)
    total = count = 0
    for b in range(tiny.ROWS):
        for t in range(1, tiny.LENGTH):
            if data["mask"][b, t] and data["mask"][b, t - 1] and (not masked or data["loss_mask"][b, t]):
                total, count = total + nats(z[b, t - 1], data["tokens"][b, t]), count + 1
    out = jax.jit(lambda d: case.loss(case.variables, d, None))(data)
    assert out.weight == count > 0
    np.testing.assert_allclose(out.sum, total, rtol=1e-5)


def test_language_modelling_does_not_mind_the_side_of_the_padding():
    case, data = tiny.case("full", "decoder"), tiny.batch()
    left = {k: data[k].copy() for k in ("tokens", "mask")}
    for row, n in enumerate(data["mask"].sum(1)):
        left["tokens"][row], left["mask"][row] = np.roll(left["tokens"][row], -n), np.roll(left["mask"][row], -n)
    loss = jax.jit(lambda d: case.loss(case.variables, d, None))
    right = loss({k: data[k] for k in left})
    assert left["mask"][:, -1].all() and not data["mask"][:, -1].all()
    np.testing.assert_allclose(loss(left).sum, right.sum, rtol=1e-5)
    assert loss(left).weight == right.weight


def test_the_model_does_not_see_the_head():
    assert model_variables({"params": 1, "peft": 2, "head": 3, "shared": 4}) == {"params": 1, "peft": 2, "shared": 4}
