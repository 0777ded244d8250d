"""What training may and may not do, for every method on both models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError
from research.peft import method as peft
from research.peft import registry, tree
from research.train.checkpoint import Checkpointer
from tests import tiny
from tests.peft.test_methods import CHAIN, cases, core, first

most = cases(slow=lambda spec, family: not core(spec))
some = cases(slow=lambda spec, family: spec != "lora" and not spec.startswith(CHAIN), keep=first)


@functools.lru_cache(maxsize=2)
def trained(spec: str, family: str) -> tuple:
    """Ten steps: (the variables before, after, the base's leaves handed in, the first two gradients, compilations)."""
    case = tiny.case(spec, family)
    state, frozen = case.start()
    gradients, traced = [], case.traces
    for step in range(10):
        state, metrics = case.step(state, frozen, tiny.micro(tiny.batch(seed=step), 1))
        assert metrics["finite"] and np.isfinite(metrics["loss"])
        if step < 2:
            gradients.append(jax.tree.map(np.array, state.opt_state[0]))
    return case.variables, state.variables(frozen), frozen, gradients, case.traces - traced


@most
def test_only_what_trains_moves(spec, family):
    before, after, frozen, _, _ = trained(spec, family)
    case = tiny.case(spec, family)
    mask = tree.paths(case.mask)
    updated = () if case.method.update is None else [p for p in mask if p.startswith("peft/")]
    before, after = tree.paths(before), tree.paths(after)
    assert list(before) == list(after) == list(mask)
    for path, m in mask.items():
        moved = np.asarray(before[path]) != np.asarray(after[path])
        assert not np.any(moved & ~np.broadcast_to(m, moved.shape)) or path in updated, f"{path} is frozen"
        assert np.any(moved) == tree.trains(m) or path in updated, f"{path} trains"
    for path, leaf in tree.paths(frozen).items():
        assert leaf is before[path], f"{path} is a copy of the base's buffer"


@most
def test_every_trained_leaf_has_a_gradient_within_two_steps(spec, family):
    case = tiny.case(spec, family)
    _, _, _, (first, second), _ = trained(spec, family)
    for collection in ("peft", "head"):
        for path, g in tree.paths(first.get(collection, {})).items():
            either = np.abs(g) + np.abs(tree.paths(second[collection])[path])
            per_layer = either.reshape(len(either), -1) if path.startswith("layers/") else either.reshape(1, -1)
            on = case.point_on(path) if collection == "peft" else lambda layer: True
            assert all((row.max() > 0) == on(layer) for layer, row in enumerate(per_layer)), path
    holes = tree.paths(tree.partition(case.variables, case.mask)[0])
    assert set(tree.paths(first)) == set(holes), "no gradient exists for what is frozen"


@most
def test_one_compilation_serves_every_step(spec, family):
    assert trained(spec, family)[-1] <= 1  # 0 where a test before has had the same step


@some
def test_a_resumed_run_is_one_never_stopped(spec, family, tmp_path):
    case, checkpoints = tiny.case(spec, family), Checkpointer(tmp_path)
    batches = [tiny.micro(tiny.batch(seed=step), 1) for step in range(4)]
    unbroken, frozen = case.start()
    for step, batch in enumerate(batches):
        if step == 2:
            checkpoints.save(step, unbroken, {})
        unbroken, _ = case.step(unbroken, frozen, batch)
    resumed, _ = checkpoints.restore(2, case.start()[0])
    for batch in batches[2:]:
        resumed, _ = case.step(resumed, frozen, batch)
    for part in ("step", "trainable", "extra", "opt_state"):
        assert tiny.same(getattr(unbroken, part), getattr(resumed, part)), part


def random(spec: str) -> bool:
    """Whether a step draws random numbers, as the method's card says."""
    names = [part.partition(":")[0] for part in registry.split(spec)]
    return "dropout" in spec or any(registry.card(name).random for name in names)


@some
def test_training_is_random_where_the_card_says(spec, family):
    case, data = tiny.case(spec, family), tiny.batch()
    realise = lambda v: peft.realised(case.method, v, case.sites)  # noqa: E731
    loss = jax.jit(lambda v, key: case.loss(realise(v), data, key).sum)
    sums = {float(loss(case.point, jax.random.key(k))) for k in range(5)}
    assert (len(sums) > 1) == random(spec)


@some
def test_micro_batches_equal_one_batch(spec, family):
    if random(spec):  # another draw for each micro-batch is meant
        return
    case = tiny.case(spec, family)
    one, metrics = case.gradients(case.point)
    two, metrics_two = case.gradients(case.point, 2)
    tiny.close(one, two, 1e-6)
    tiny.close(metrics, metrics_two, 1e-6)
    assert metrics["grad_norm"] > 1e-3


@pytest.mark.slow
@some
def test_remat_changes_no_gradient(spec, family):
    case = tiny.case(spec, family)
    for remat in ["full", "dots"] if core(spec) else ["full"]:
        other = tiny.case(spec, family, remat=remat)
        tiny.close(case.gradients(case.point), other.gradients(case.point), 1e-6)


def test_lora_dropout_is_only_in_training():
    case = tiny.case("lora:dropout=0.1", "encoder")
    data = tiny.batch()
    loss = jax.jit(case.loss)
    quiet = [loss(case.point, data, None).sum for _ in range(2)]
    noisy = [loss(case.point, data, jax.random.key(k)).sum for k in (0, 0, 1)]
    assert quiet[0] == quiet[1] and noisy[0] == noisy[1] != noisy[2] != quiet[0]


@pytest.mark.parametrize(
    "spec", ["lora:dropout=1e-6,targets=attn/(k|v)+ia3", "ia3+lora:dropout=1e-6,targets=attn/(k|v)"]
)
def test_training_with_hardly_any_dropout_is_evaluation(spec):
    case = tiny.case(spec, "encoder")
    data = tiny.batch()
    dropped, evaluated = (jax.jit(case.loss)(case.point, data, rng).sum for rng in (jax.random.key(0), None))
    np.testing.assert_allclose(dropped, evaluated, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_method_may_train_part_of_a_leaf(family):
    """A mask of elements: the optimiser's weight decay must not move the others."""
    method = registry.parse("lora")
    case = tiny.Case("lora", family)
    whole = peft.mask(method, case.variables)
    chosen = tree.map_with_path(
        lambda p, m, x: np.arange(x.size).reshape(x.shape) % 2 == 0 if p.endswith("lora/a") else m,
        whole,
        case.variables,
    )
    case.mask = chosen
    state, frozen = case.start()
    for step in range(3):
        state, _ = case.step(state, frozen, tiny.micro(tiny.batch(seed=step), 1))
    for name in ("q", "v"):
        a = case.variables["peft"]["layers"]["attn"][name]["lora"].a
        moved = np.asarray(a != state.trainable["peft"]["layers"]["attn"][name]["lora"].a).ravel()
        assert moved[::2].all() and not moved[1::2].any()
    assert tree.count(case.variables, chosen) < tree.count(case.variables, whole)


@pytest.mark.parametrize("start", ["random", "vocab"])
def test_prompt_starts(start):
    tokens = tiny.case(f"prompt:start={start}", "decoder").variables["peft"]["embed"]["prompt"]["prompt"].table
    table = tiny.params(tiny.DECODER)["embed"]["tokens"]["embedding"]
    rows = [int(jnp.argmin(jnp.abs(table - t).sum(axis=1))) for t in tokens]
    from_table = np.array_equal(table[np.array(rows)], tokens)
    assert from_table == (start == "vocab")
    assert start == "random" or len(set(rows)) == len(tokens), "without replacement"
    assert start == "vocab" or (jnp.abs(tokens).max() <= 0.5 and jnp.abs(tokens).max() > 0.45)


@pytest.mark.parametrize(
    "spec", ["prompt:start=vocab,pool=3", "prompt:start=vocab,length=65", "prompt:start=vocab,pool=0"]
)
def test_a_vocabulary_start_needs_rows_enough(spec):
    with pytest.raises(FlagError, match="vocabulary rows to draw from: at most"):
        _ = tiny.Case(spec, "decoder").variables
