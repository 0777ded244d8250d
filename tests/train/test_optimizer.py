import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError
from research.train import optimizer
from tests import tiny

TREE = {
    "w": {"kernel": jnp.full((3, 4), 2.0), "bias": jnp.full(4, 2.0)},
    "norm": {"scale": jnp.full(4, 2.0)},
    "hole": None,
}


@pytest.mark.parametrize(
    "name, t, want",
    [
        ("constant", 0, 0.0), ("constant", 5, 0.5), ("constant", 10, 1.0), ("constant", 99, 1.0),
        ("linear", 5, 0.5), ("linear", 10, 1.0), ("linear", 55, 0.5), ("linear", 100, 0.0), ("linear", 500, 0.0),
        ("cosine", 10, 1.0), ("cosine", 40, 0.5 * (1 + math.cos(math.pi / 3))), ("cosine", 55, 0.5),
        ("cosine", 100, 0.0),
        ("wsd", 5, 0.5), ("wsd", 10, 1.0), ("wsd", 82, 1.0), ("wsd", 91, 0.5), ("wsd", 100, 0.0), ("wsd", 500, 0.0),
        ("inverse_sqrt", 5, 0.5), ("inverse_sqrt", 10, 1.0), ("inverse_sqrt", 40, 0.5), ("inverse_sqrt", 1000, 0.1),
    ],
)  # fmt: skip
def test_schedules_have_their_closed_form(name, t, want):
    for warmup in (10, 0.1):
        rate = optimizer.make_schedule(name, 0.02, steps=100, warmup=warmup)
        np.testing.assert_allclose(rate(jnp.asarray(t)), 0.02 * want, atol=1e-8)


def test_schedule_ends_at_its_final_fraction_and_starts_full_without_warmup():
    for name in ("linear", "cosine", "wsd"):
        rate = optimizer.make_schedule(name, 1.0, steps=10, final=0.1)
        np.testing.assert_allclose([rate(0), rate(10)], [1.0, 0.1], rtol=1e-6)
    rate = optimizer.make_schedule("inverse_sqrt", 1.0, warmup=4, final=0.1)  # needs no number of steps
    np.testing.assert_allclose([rate(2), rate(16), rate(10**6)], [0.5, 0.5, 0.1], rtol=1e-6)


@pytest.mark.parametrize("name", list(optimizer.DEFAULTS))
def test_every_optimiser_descends_with_holes_and_under_vmap(name):
    tx = optimizer.make(name, 0.05, schedule="linear", steps=40, warmup=2)
    value = lambda w: sum(jnp.sum(x**2) for x in jax.tree.leaves(w))  # noqa: E731

    def train(w):
        def one(carry, _):
            w, opt = carry
            updates, opt = tx.update(jax.grad(value)(w), opt, w)
            return (jax.tree.map(jnp.add, w, updates), opt), None

        return jax.lax.scan(one, (w, tx.init(w)), None, 40)[0][0]

    alone = train(TREE)
    assert value(alone) < 0.8 * value(TREE) and alone["hole"] is None
    both = jax.vmap(train)(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), TREE))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-5, atol=1e-6), alone, both)


@pytest.mark.parametrize("decay, kept", [("matrices", 2.0), ("all", 1.8)])
def test_decay_is_decoupled_and_spares_biases_and_norms(decay, kept):
    tx = optimizer.make("adamw", 0.1, weight_decay=1.0, decay=decay)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, TREE), tx.init(TREE), TREE)
    new = jax.tree.map(jnp.add, TREE, updates)
    np.testing.assert_allclose(new["w"]["kernel"], 1.8, rtol=1e-6)
    np.testing.assert_allclose(new["w"]["bias"], kept, rtol=1e-6)
    np.testing.assert_allclose(new["norm"]["scale"], kept, rtol=1e-6)


def test_a_leaf_of_a_scanned_stack_is_judged_without_its_layers():
    site = {
        "ia3": {"scale": jnp.ones((3, 5))},  # (IA)3's vectors, [L, out]
        "bottleneck": {"down": jnp.ones((3, 4, 2)), "down_bias": jnp.ones((3, 2))},  # [L, in, m], [L, m]
        "lora": {"a": jnp.ones((3, 4, 2)), "hole": None},  # [L, in, r]
    }
    taken = {
        "ia3": {"scale": False},
        "bottleneck": {"down": True, "down_bias": False},
        "lora": {"a": True, "hole": None},
    }
    assert optimizer.decayed({"peft": {"layers": {"q": site}}}) == {"peft": {"layers": {"q": taken}}}
    one = jax.tree.map(lambda x: x[0], site)
    assert optimizer.decayed({"peft": {"layers_0": {"q": one}}}) == {"peft": {"layers_0": {"q": taken}}}
    tx = optimizer.make("sgd", 0.1, weight_decay=1.0)
    trainable = {"peft": {"layers": {"q": site}}}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, trainable), tx.init(trainable), trainable)
    moved = jax.tree.map(lambda u: bool((u != 0).any()), updates)
    assert moved == {"peft": {"layers": {"q": taken}}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_half_precision_step_keeps_what_trains_and_its_state_in_fp32(name):
    """Base and products in bf16; LoRA's matrices, their gradients' moments and the loss in fp32."""
    case = tiny.Case("lora:targets=all", "decoder", dtype="bfloat16", param_dtype="bfloat16")
    tx = optimizer.make(name, 1e-6)
    state, frozen = case.start(case.point, tx)
    assert frozen["params"]["layers"]["attn"]["q"]["kernel"].dtype == jnp.bfloat16
    before = state.trainable
    after, metrics = jax.jit(case.stepper(tx))(state, frozen, tiny.micro(tiny.batch(), 2))
    floats = [x for x in jax.tree.leaves((after.trainable, after.opt_state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and all(x.dtype == jnp.float32 for x in floats) and metrics["loss"].dtype == jnp.float32
    # Steps of 1e-6, which bf16 would round away, arrive.
    moved = jax.tree.map(lambda a, b: float(jnp.mean(a != b)), before, after.trainable)
    assert all(x > 0.5 for x in jax.tree.leaves(moved))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"name": "adamww"}, "Did you mean 'adamw'"),
        ({"schedule": "cosin", "steps": 5}, "Did you mean 'cosine'"),
        ({"decay": "some"}, "Valid: all, matrices"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be a finite number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"schedule": "linear"}, "needs the number of steps"),
        ({"warmup": 11, "steps": 10}, "longer than steps=10"),
        ({"warmup": 2.5, "steps": 10}, "neither a number of steps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"name": "adam", "weight_decay": 0.1}, "'adamw'"),
        ({"b1": 1.0}, "b1=1.0"),
        ({"final": 2.0}, "final=2.0"),
    ],
)
def test_bad_values_are_flag_errors(options, text):
    with pytest.raises(FlagError) as error:
        optimizer.make(**options)
    assert text in str(error.value) and "\n" not in str(error.value)
