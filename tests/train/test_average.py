"""The moving average in the optimiser's state, against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.train import average, optimizer, state
from tests.train import toy

DECAY = 0.6


def closed_form(params: list, decay: float) -> np.ndarray:
    """params: after 0, 1, ... updates -> their average with d_n = min(decay, (1 + n) / (10 + n))."""
    mean = np.asarray(params[0], np.float64)
    for n, new in enumerate(params[1:]):
        d = min(decay, (1 + n) / (10 + n))
        mean = d * mean + (1 - d) * np.asarray(new, np.float64)
    return mean


def make(decay: float = DECAY, **options):
    return toy.setup(tx=average.averaged(optimizer.make("adamw", 1e-1, weight_decay=0.1), decay), **options)


@pytest.mark.parametrize("decay", [DECAY, 0.0, 0.999])
def test_the_average_is_the_closed_form(decay: float):
    tx = average.averaged(optax.sgd(0.5), decay)
    s, seen = state.create({"w": jnp.arange(3.0), "hole": None}, tx, jax.random.key(0)), [np.arange(3.0)]
    for k in range(6):
        updates, opt_state = tx.update({"w": jnp.float32([1, -2, k]), "hole": None}, s.opt_state, s.trainable)
        s = s.replace(trainable=optax.apply_updates(s.trainable, updates), opt_state=opt_state)
        seen.append(s.trainable["w"])
        np.testing.assert_allclose(average.read(s, decay).trainable["w"], closed_form(seen, decay), atol=1e-5)
    np.testing.assert_allclose(seen[-1], np.arange(3) - 0.5 * np.array([6, -12, 15]))


@pytest.mark.slow
def test_it_is_of_what_a_step_leaves_and_changes_no_step():
    """Factors of the learning rate come after the optimiser."""
    rates = lambda v: jax.tree.map(lambda x: 0.5, v)  # noqa: E731
    s, frozen, step = make(rates=rates)
    plain, _, plain_step = toy.setup(tx=optimizer.make("adamw", 1e-1, weight_decay=0.1), rates=rates)
    step, plain_step, seen = jax.jit(step), jax.jit(plain_step), [s.trainable["peft"]["w"]["a"]]
    for k in range(12):
        s, plain = step(s, frozen, toy.batch(k))[0], plain_step(plain, frozen, toy.batch(k))[0]
        seen.append(s.trainable["peft"]["w"]["a"])
        found = average.read(s, DECAY).trainable["peft"]["w"]["a"]
        np.testing.assert_allclose(found, closed_form(seen, DECAY), atol=1e-5)
    assert toy.same(s.trainable, plain.trainable)


def test_a_fresh_average_is_what_training_starts_from():
    s, _, _ = make()
    assert toy.same(average.read(s, DECAY).trainable, s.trainable)


def test_half_precision_is_averaged_in_full():
    tx = average.averaged(optimizer.make("sgd", 1.0), 0.999)
    s = state.create({"w": jnp.ones(3, jnp.bfloat16)}, tx, jax.random.key(0))
    assert s.opt_state.average["w"].dtype == jnp.float32
    assert average.read(s, 0.999).trainable["w"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_the_average_alone():
    s, frozen, step = make()
    step = jax.jit(step)
    s = step(s, frozen, toy.batch(0))[0]
    before = average.read(s, DECAY).trainable
    bad = toy.batch(1) | {"y": np.full_like(toy.batch(1)["y"], np.nan)}
    assert toy.same(average.read(step(s, frozen, bad)[0], DECAY).trainable, before)
