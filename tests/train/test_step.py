import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.errors import FlagError
from research.peft import tree
from research.tasks.loss import Loss
from research.train import optimizer, state, step
from tests.train import toy


@pytest.mark.parametrize("micro", [2, 4])
def test_micro_batches_equal_one_batch(micro):
    one, metrics = toy.run(toy.setup())
    many, metrics_many = toy.run(toy.setup(), micro=micro)
    for a, b in zip(jax.tree.leaves(one.trainable), jax.tree.leaves(many.trainable), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name in ("loss", "near", "weight", "grad_norm"):
        np.testing.assert_allclose(metrics[name], metrics_many[name], rtol=1e-5)


def test_gradient_is_the_weighted_mean_over_all_micro_batches():
    s, frozen, stepper = toy.setup(tx=optax.sgd(1.0))
    batch = toy.batch(0, micro=4)
    flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items()}

    def mean(trainable):
        out = toy.loss(tree.combine(trainable, s.extra, frozen), flat, None)
        return out.sum / out.weight

    want = jax.tree.map(lambda w, g: w - g, s.trainable, jax.grad(mean)(s.trainable))
    new, metrics = jax.jit(stepper)(s, frozen, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.trainable, want)
    out = toy.loss(s.variables(frozen), flat, None)
    np.testing.assert_allclose(metrics["near"], out.metrics["near"][0] / out.weight, rtol=1e-6)


@pytest.mark.parametrize("everything", [False, True])
def test_frozen_leaves_keep_their_bits_and_nothing_of_the_base_is_donated(everything):
    variables, tx = toy.variables(), optimizer.make("adamw", 1e-2)
    before = jax.tree.map(np.array, variables)
    mask = jax.tree.map(lambda _: True, toy.MASK) if everything else toy.MASK
    trainable, extra, frozen = state.split(variables, mask)
    s = state.create(trainable, tx, jax.random.key(0), extra)
    s, _ = toy.run((s, frozen, step.make_step(toy.loss, tx)), 10)
    assert not any(x.is_deleted() for x in jax.tree.leaves(variables))
    assert toy.same(variables, before)
    assert toy.same(s.variables(frozen)["params"], before["params"]) is not everything
    assert toy.same(s.extra["peft"]["w"]["scale"], before["peft"]["w"]["scale"] if not everything else None)


def test_state_is_really_donated():
    s, frozen, stepper = toy.setup()
    old = s.trainable["peft"]["w"]["a"]
    toy.run((s, frozen, stepper), 1)
    assert old.is_deleted()


def test_optimiser_state_has_only_trainable_leaves():
    s, _, _ = toy.setup()
    trained = tree.count(s.trainable)
    assert trained == toy.D * toy.R * 2 + toy.D + 1
    assert tree.count(s.opt_state) == 2 * trained + 2  # two moments, the counts of Adam and of the schedule


def test_dropout_differs_by_step_and_micro_batch_but_not_by_repetition():
    s, frozen, stepper = toy.setup(tx=optax.sgd(0.0))
    stepper, batch = jax.jit(stepper), toy.batch(0, drop=True)
    first, a = stepper(s, frozen, batch)
    _, b = stepper(s, frozen, batch)
    _, c = stepper(first, frozen, batch)
    _, d = stepper(s, frozen, {k: np.concatenate([v, v]) for k, v in batch.items()})
    assert a["loss"] == b["loss"]
    assert abs(float(c["loss"] - a["loss"])) > 1e-6
    assert abs(float(d["loss"] - a["loss"])) > 1e-6


def test_element_mask_holds_its_elements_against_weight_decay():
    part = np.zeros((toy.D, toy.D), bool)
    part[::2, 1] = True
    mask = jax.tree.map(lambda _: False, toy.MASK)
    mask["params"]["w"]["kernel"] = part
    s, frozen, stepper = toy.setup(mask=mask, tx=optimizer.make("adamw", 1e-2, weight_decay=0.5))
    old = np.array(s.trainable["params"]["w"]["kernel"])
    s, _ = toy.run((s, frozen, stepper), 5)
    new = np.array(s.trainable["params"]["w"]["kernel"])
    assert old[~part].tobytes() == new[~part].tobytes()
    assert (old[part] != new[part]).all()
    # The mask is an argument: as a constant it would be in the program's text, element by element.
    assert "i1>" not in "".join(
        x for x in jax.jit(stepper).lower(s, frozen, toy.batch(0)).as_text().splitlines() if "dense<[" in x
    )


def test_element_masks_may_differ_by_seed():
    part = np.zeros((2, toy.D, toy.D), bool)
    part[0, 0], part[1, 1] = True, True
    mask = jax.tree.map(lambda _: False, toy.MASK)
    setups = [toy.setup(mask=mask | {"params": {"w": {"kernel": p, "bias": False}}}) for p in part]
    s = state.stack([x for x, _, _ in setups])
    old = np.array(s.trainable["params"]["w"]["kernel"])
    new, _ = jax.jit(step.over_seeds(setups[0][2], shared_batch=True))(s, setups[0][1], toy.batch(0))
    moved = old != np.array(new.trainable["params"]["w"]["kernel"])
    assert (moved == part).all()


def test_clip_bounds_the_norm_of_the_whole_gradient():
    s, frozen, stepper = toy.setup(tx=optax.sgd(1.0), clip_norm=0.01)
    new, metrics = jax.jit(stepper)(s, frozen, toy.batch(0))
    moved = jax.tree.map(jnp.subtract, new.trainable, s.trainable)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.01, rtol=1e-4)
    assert metrics["grad_norm"] > 0.01


@pytest.mark.parametrize("bad", [-1, 0, float("nan"), float("inf")])
def test_a_clip_norm_that_clips_nothing_or_turns_the_step_round_is_refused(bad):
    with pytest.raises(FlagError, match=f"clip_norm={bad} must be a finite number above 0"):
        step.make_step(toy.loss, optax.sgd(1.0), clip_norm=bad)


def test_rates_multiply_updates():
    def rates(variables):
        return tree.map_with_path(lambda path, _: 16.0 if path.endswith("/b") else 1.0, variables)

    s, frozen, plain = toy.setup(tx=optax.sgd(0.1))
    fast = step.make_step(toy.loss, optax.sgd(0.1), rates=rates)
    moved = [
        jax.tree.map(jnp.subtract, jax.jit(f)(s, frozen, toy.batch(0))[0].trainable, s.trainable) for f in (plain, fast)
    ]
    np.testing.assert_allclose(moved[1]["peft"]["w"]["b"], 16 * moved[0]["peft"]["w"]["b"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(moved[1]["peft"]["w"]["a"], moved[0]["peft"]["w"]["a"], rtol=1e-6)


@pytest.mark.parametrize("micro", [1, 4])
def test_penalty_is_added_once_whatever_the_number_of_micro_batches(micro):
    s, frozen, stepper = toy.setup(
        tx=optax.sgd(1.0), penalty=lambda v, rng: 3.0 * v["peft"]["w"]["a"].sum() + v["params"]["w"]["bias"].sum()
    )
    plain, _ = toy.run(toy.setup(tx=optax.sgd(1.0)), 1, micro=micro)
    new, metrics = jax.jit(stepper)(s, frozen, toy.batch(0, micro=micro))
    np.testing.assert_allclose(new.trainable["peft"]["w"]["a"], plain.trainable["peft"]["w"]["a"] - 3.0, atol=1e-5)
    np.testing.assert_allclose(metrics["penalty"], 3.0 * s.trainable["peft"]["w"]["a"].sum(), rtol=1e-6)


def test_realise_is_differentiated_through():
    def realise(v):
        return v | {"peft": {"w": v["peft"]["w"] | {"a": 2.0 * v["peft"]["w"]["a"]}}}

    s, frozen, plain = toy.setup(tx=optax.sgd(1.0))
    doubled = s.replace(trainable=s.trainable | {"peft": realise({"peft": s.trainable["peft"]})["peft"]})
    a, _ = jax.jit(step.make_step(toy.loss, optax.sgd(1.0), realise=realise))(s, frozen, toy.batch(0))
    b, _ = jax.jit(plain)(doubled, frozen, toy.batch(0))
    grad = [x.trainable["peft"]["w"]["a"] - y.trainable["peft"]["w"]["a"] for x, y in ((a, s), (b, doubled))]
    np.testing.assert_allclose(grad[0], 2 * grad[1], atol=2e-6)


def test_update_changes_trained_and_frozen_leaves_of_peft_last():
    def update(added, grads, index):
        assert grads["w"]["scale"] is None
        w = added["w"]
        return {
            "w": {
                "a": w["a"].at[:, 0].set(0.0),
                "b": w["b"],
                "scale": w["scale"] + index + jnp.abs(grads["w"]["b"]).max(),
            }
        }

    setup = toy.setup(update=update)
    before = float(setup[0].extra["peft"]["w"]["scale"])
    s, _ = toy.run(setup, 2)
    assert not np.any(s.trainable["peft"]["w"]["a"][:, 0]) and np.all(s.trainable["peft"]["w"]["a"][:, 1])
    assert float(s.extra["peft"]["w"]["scale"]) > before + 1
    assert s.extra["params"]["w"]["kernel"] is None


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_moves_when_not_finite(where):
    def loss(v, batch, rng):
        out = toy.loss(v, batch, rng)
        bad = jnp.inf if where == "loss" else jnp.sqrt(jnp.abs(v["head"]["h"]["bias"]).sum() * 0.0)  # slope inf * 0
        return Loss(out.sum + bad, out.weight, out.metrics)

    s, frozen, _ = toy.setup()
    copy = jax.tree.map(jnp.copy, s)
    new, metrics = toy.run((copy, frozen, step.make_step(loss, optimizer.make("adamw", 1e-2, weight_decay=0.1))), 1)
    assert not metrics["finite"]
    assert np.isfinite(metrics["loss"]) == (where == "gradient")
    assert toy.same((new.trainable, new.extra, new.opt_state), (s.trainable, s.extra, s.opt_state))
    assert int(new.step) == 1


@pytest.mark.parametrize("factor", [jnp.inf, jnp.nan])
def test_nothing_moves_when_the_update_alone_is_not_finite(factor):
    rates = lambda v: jax.tree.map(lambda _: factor, v)  # noqa: E731
    s, frozen, stepper = toy.setup(rates=rates)
    before = jax.tree.map(jnp.copy, s)
    new, metrics = toy.run((s, frozen, stepper), 1)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert not metrics["finite"] and not np.isfinite(metrics["update_norm"])
    assert toy.same((new.trainable, new.opt_state), (before.trainable, before.opt_state))


def test_update_norm_is_of_what_the_weights_moved():
    s, frozen, stepper = toy.setup()
    new, metrics = jax.jit(stepper)(s, frozen, toy.batch(0))
    moved = jax.tree.map(jnp.subtract, new.trainable, s.trainable)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(moved), rtol=1e-4)


def test_batch_without_weight_has_loss_zero():
    s, frozen, stepper = toy.setup(tx=optax.sgd(1.0))
    batch = toy.batch(0) | {"weight": np.zeros((1, 16), np.float32)}
    new, metrics = jax.jit(stepper)(s, frozen, batch)
    assert metrics["loss"] == 0 and metrics["finite"]
    assert toy.same(new.trainable, s.trainable)


def test_task_may_not_take_a_reserved_name():
    s, frozen, _ = toy.setup()
    bad = lambda v, b, r: toy.loss(v, b, r)._replace(metrics={"loss": (jnp.zeros(()), jnp.ones(()))})  # noqa: E731
    with pytest.raises(ValueError, match="loss"):
        step.make_step(bad, optax.sgd(1.0))(s, frozen, toy.batch(0))


@pytest.mark.parametrize("how", ["map", "vmap"])
def test_seeds_in_one_program_equal_separate_runs(how):
    setups = [toy.setup(seed) for seed in range(3)]
    frozen, stepper = setups[0][1], setups[0][2]
    # What is frozen and yet differs by run.
    states = [s.replace(extra=jax.tree.map(lambda x, i=i: x * (i + 1), s.extra)) for i, (s, _, _) in enumerate(setups)]
    together = jax.jit(step.over_seeds(stepper, how), donate_argnums=(0,))
    s, single = state.stack(states), jax.jit(stepper)
    for k in range(3):
        batches = [toy.batch(k, micro=2, seed=i, drop=True) for i in range(3)]
        s, metrics = together(s, frozen, jax.tree.map(lambda *x: np.stack(x), *batches))
        states, alone = zip(*[single(one, frozen, b) for one, b in zip(states, batches, strict=True)], strict=True)
    assert metrics["loss"].shape == (3,)
    np.testing.assert_allclose(metrics["loss"], [m["loss"] for m in alone], rtol=1e-5)
    for i in range(3):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.take(s, i).trainable, states[i].trainable
        )


def test_seeds_can_share_a_batch():
    (a, frozen, stepper), (b, _, _) = toy.setup(0), toy.setup(1)
    for how in ("map", "vmap"):
        both = jax.jit(step.over_seeds(stepper, how, shared_batch=True))
        _, metrics = both(state.stack([a, b]), frozen, toy.batch(0))
        np.testing.assert_allclose(metrics["loss"][1], jax.jit(stepper)(b, frozen, toy.batch(0))[1]["loss"], rtol=1e-5)


@pytest.mark.parametrize("how", [None, "map", "vmap"])
def test_evaluation_sums_before_it_divides(how):
    (a, frozen, _), (b, _, _) = toy.setup(0), toy.setup(1)
    batches = [toy.rows(k) for k in range(3)]
    whole = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    if how is None:
        means = step.make_eval(toy.loss)(a, frozen, batches)
        states, means = [a], {k: [v] for k, v in means.items()}
    else:
        states, means = [a, b], step.make_eval(toy.loss, seeds=True, how=how)(state.stack([a, b]), frozen, batches)
    for i, s in enumerate(states):
        out = toy.loss(s.variables(frozen), whole, None)
        np.testing.assert_allclose(means["loss"][i], out.sum / out.weight, rtol=1e-5)
        np.testing.assert_allclose(means["near"][i], out.metrics["near"][0] / out.weight, rtol=1e-5)
        assert means["weight"][i] == out.weight


def test_evaluation_can_be_stopped_between_batches():
    s, frozen, _ = toy.setup()
    seen = []
    batches = (seen.append(k) or toy.rows(k) for k in range(5))
    assert step.make_eval(toy.loss)(s, frozen, batches, lambda: len(seen) > 2) is None
    assert len(seen) == 3


def test_memory_of_a_compiled_step():
    s, frozen, stepper = toy.setup()
    compiled = step.compile(stepper, s, frozen, toy.batch(0))
    use = step.memory(compiled)
    # The base's bias and kernel and the state are arguments; the state comes back in its own buffers.
    assert use["argument"] >= tree.nbytes(frozen) + tree.nbytes(s.trainable) + tree.nbytes(s.opt_state)
    assert use["alias"] >= tree.nbytes(s.trainable) + tree.nbytes(s.opt_state)
    assert use["peak"] == use["argument"] + use["output"] + use["temp"] - use["alias"]
    new, _ = compiled(s, frozen, toy.batch(0))
    assert s.trainable["peft"]["w"]["a"].is_deleted() and int(new.step) == 1


def test_there_is_one_trainer_and_all_else_that_optimises_is_part_of_a_method():
    root, where = Path(__file__).parents[2], {"apply_updates": set(), "make_step": set(), "loop.fit": set()}
    for file in (file for part in ("research", "experiments", "tpu") for file in (root / part).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            for name in where:
                if called == name or called.endswith(f".{name}"):
                    where[name].add(file.relative_to(root).as_posix())
    assert where == {
        # Before training begins: FAR's and LT-SFT's choice of elements, and the decoder of intrinsic prompts.
        "apply_updates": {"research/train/step.py", "research/peft/elements.py", "research/peft/ipt.py"},
        # `kill_test` breaks it on purpose, `plan` compiles it alone.
        "make_step": {"experiments/shared/training.py", "experiments/kill_test.py", "tpu/plan.py"},
        "loop.fit": {"experiments/shared/training.py", "experiments/shared/cell.py", "experiments/kill_test.py"},
    }
