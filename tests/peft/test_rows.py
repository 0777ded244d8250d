"""Rows of one batch with adapters of their own: every method, gradients, the bare base, bad input, and the cost."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError, ModelError
from research.models.bert import BertConfig
from research.models.registry import build
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.rows import apply_rows, stack
from research.quant.tree import quantise_tree
from research.tasks import classify
from research.tasks.loss import model_variables
from tests import tiny
from tests.peft.test_methods import first

IDS = np.array([2, 0, -1, 1])
EXTRA = ["lora:layers=1", "lora:rank=2+prefix:length=3,hidden=8+layernorm", "linear_probe"]
QUICK = ["lora", "bitfit", "prompt", registry.small("vera"), *EXTRA]
SPECS = dict.fromkeys([registry.small(name) for name in registry.names()] + EXTRA)


def points(case: tiny.Case, count: int) -> list[dict]:
    """Variables that differ in all that trains; what does not train is the same in all, as a seed makes it."""
    return [case.moved(10 + seed) for seed in range(count)]


def adapters(case: tiny.Case) -> list[dict]:
    """Three, realised."""
    return [peft.realised(case.method, point, case.sites) for point in points(case, 3)]


def forward(case: tiny.Case):
    """Hidden states or logits, and those of a task's head, of a batch."""

    def apply(variables: dict, tokens: jax.Array, mask: jax.Array) -> dict:
        method = "__call__" if case.family == "encoder" else "logits"
        out = {"model": case.model.apply(model_variables(variables), tokens, mask, method=method)}
        if "head" in variables:
            out["head"] = classify.logits(case.model, variables, {"tokens": tokens, "mask": mask})
        return out

    return apply


@functools.cache
def bare(family: str, has_head: bool) -> tuple[dict, dict]:
    """The base's variables, and what it gives."""
    case, data = tiny.case("linear_probe", family), tiny.batch()
    variables = {"params": tiny.params(case.config)} | ({"head": case.variables["head"]} if has_head else {})
    return variables, jax.jit(forward(case))(variables, data["tokens"], data["mask"])


def close(found: dict, wanted: dict, row: int, real: np.ndarray) -> None:
    np.testing.assert_allclose(found["model"][row][real], wanted["model"][row][real], atol=1e-5, rtol=1e-5)
    assert ("head" in found) == ("head" in wanted)
    if "head" in wanted:
        np.testing.assert_allclose(found["head"][row], wanted["head"][row], atol=1e-5, rtol=1e-5)


CASES = [
    pytest.param(spec, family, marks=() if family == "encoder" and spec in QUICK else pytest.mark.slow)
    for family in tiny.CONFIGS
    for spec in SPECS
    if first(spec, family) or spec in QUICK
]


@pytest.mark.parametrize(("spec", "family"), CASES)
def test_rows_equal_the_runs_of_one_adapter_each(spec, family):
    case, data = tiny.case(spec, family), tiny.batch()
    try:
        _ = case.mask
    except FlagError as error:
        assert "train" in str(error)  # the model has nothing for the method
        return
    each, fn = adapters(case), jax.jit(forward(case))
    own, common = stack(each)
    kernels = [path for path in tree.paths(case.mask) if path.endswith("kernel") and path.startswith("params/")]
    shared = tree.paths(common)
    frozen = [path for path in kernels if not tree.trains(tree.paths(case.mask)[path])]
    assert all(shared[path] is tree.paths(each[0])[path] for path in frozen), "the frozen base is not copied"
    base, plain = bare(family, case.has_head)
    together = apply_rows(fn, own, common, IDS, data["tokens"], data["mask"], base=base)
    alone = [fn(variables, data["tokens"], data["mask"]) for variables in each]
    for row, id_ in enumerate(IDS):
        if id_ < 0:
            assert tiny.same(jax.tree.map(lambda x: x[row], together), jax.tree.map(lambda x: x[row], plain))  # noqa: B023
        else:
            close(together, alone[id_], row, data["mask"][row] == 1)
    far = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, alone[:2]), strict=True))
    assert far > 1e-3, "the adapters differ"


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("lora:targets=all", "encoder"),
        ("bitfit", "encoder"),
        pytest.param("prefix:length=3,hidden=8", "decoder", marks=pytest.mark.slow),
        pytest.param("vera:rank=6+ia3", "decoder", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_rows_are_those_of_one_adapter_each(spec, family):
    case, data, ids = tiny.case(spec, family), tiny.batch(), np.array([1, 0, 1, 1])
    each = points(case, 2)
    own, common = stack(each, case.mask)

    def one(variables: dict, data: dict) -> jax.Array:
        out = case.plain_loss(peft.realised(case.method, variables, case.sites), data, None)
        return out.sum[None]

    together = jax.jit(jax.grad(lambda own: jnp.sum(apply_rows(one, own, common, ids, data))))(own)

    @jax.jit
    def alone(point: dict, rows: dict) -> dict:
        trained, rest = tree.partition(point, case.mask)
        return jax.grad(lambda t: one(tree.combine(t, rest), rows)[0])(trained)

    for i, point in enumerate(each):
        weight = np.where(ids == i, data["weight"], 0).astype(np.float32)
        grads = alone(point, data | ({"weight": weight} if case.has_head else {"mask": _only(data["mask"], ids == i)}))
        tiny.close(jax.tree.map(lambda g: g[i], together), grads, 1e-4)  # noqa: B023


def _only(mask: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A loss on tokens counts no row without any."""
    return mask * rows[:, None].astype(mask.dtype)


@pytest.mark.slow
def test_frozen_leaves_that_differ_are_gathered_too():
    case, data, fn = tiny.case("lora", "encoder"), tiny.batch(), forward(tiny.case("lora", "encoder"))
    small, large = ({"params": case.point["params"], "peft": tiny.case(s, "encoder").point["peft"]} for s in _ALPHAS)
    own, common = stack([small, large])
    scales = [path for path in tree.paths(own) if path.endswith("scale")]
    assert len(scales) == 2 and not any(path.endswith("scale") for path in tree.paths(common["peft"]))
    out = apply_rows(fn, own, common, [0, 1, 1, 0], data["tokens"], data["mask"])
    for row, variables in enumerate((small, large, large, small)):
        close(out, jax.jit(fn)(variables, data["tokens"], data["mask"]), row, data["mask"][row] == 1)


_ALPHAS = ("lora", "lora:alpha=3")


@pytest.mark.slow
def test_a_quantised_base_is_shared():
    case, data, fn = tiny.case("lora", "decoder"), tiny.batch(), forward(tiny.case("lora", "decoder"))
    params = quantise_tree(case.point["params"])
    each = [{"params": params, "peft": tiny.noise(case.point["peft"], seed=s)} for s in range(2)]
    own, common = stack(each)
    assert all(
        leaf is common_leaf for leaf, common_leaf in zip(*map(jax.tree.leaves, (params, common["params"])), strict=True)
    )
    out = apply_rows(fn, own, common, [1, 0, 1, 0], data["tokens"], data["mask"])
    for row, id_ in enumerate((1, 0, 1, 0)):
        close(out, jax.jit(fn)(each[id_], data["tokens"], data["mask"]), row, data["mask"][row] == 1)


def test_equal_adapters_are_stacked_only_where_they_train():
    case = tiny.case("lora", "encoder")
    own, common = stack([case.variables] * 2)
    assert not jax.tree.leaves(own) and tiny.same(common, case.variables)
    own, common = stack([case.variables] * 2, case.mask)
    assert {path.rpartition("/")[2] for path in tree.paths(own["peft"])} == {"a", "b"}
    assert len(tree.paths(own["head"])) == 2 and not tree.paths(own["params"])
    assert tiny.same(tree.combine(jax.tree.map(lambda x: x[1], own), common), case.variables)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda v: v | {"peft": tiny.case("lora:rank=4", "encoder").variables["peft"]},
            r"/lora/a is float32.*rank|same",
        ),
        (lambda v: v | {"peft": tiny.case("ia3", "encoder").variables["peft"]}, "no such leaf"),
        (
            lambda v: v | {"peft": tiny.case("lora:dropout=0.5", "encoder").variables["peft"]},
            "no array, such as dropout",
        ),
        (lambda v: v | {"params": tiny.noise(v["params"])}, "different bases: params/"),
    ],
)
def test_adapters_that_do_not_stack(change, words):
    case = tiny.case("lora", "encoder")
    with pytest.raises(ModelError, match=words):
        stack([case.variables, change(case.variables)], case.mask)
    with pytest.raises(ModelError, match="no adapter"):
        stack([])


@pytest.mark.parametrize(
    ("ids", "words"), [([0, 3], "row 1 has id 3"), ([-1, 0], "row 0 has id -1.*base="), ([0, -2], "id -2")]
)
def test_an_id_without_an_adapter(ids, words):
    own, common = stack([{"x": jnp.full(2, float(i))} for i in range(3)])
    fn = lambda v, y: v["x"] * y  # noqa: E731
    with pytest.raises(ModelError, match=words):
        apply_rows(fn, own, common, ids, jnp.ones((2, 2)))
    traced = jax.jit(lambda ids: apply_rows(fn, own, common, ids, jnp.ones((2, 2))))(jnp.asarray(ids))
    np.testing.assert_array_equal(np.isnan(traced[:, 0]), [i not in (0, 1, 2) for i in ids])


def test_base_rows_cost_nothing_where_there_are_none():
    own, common = stack([{"x": jnp.full(2, float(i))} for i in range(3)])
    jaxpr = jax.make_jaxpr(lambda ids, y: apply_rows(lambda v, y: v["x"] + y, own, common, ids, y, base={"x": 9.0}))(
        jnp.zeros(2, jnp.int32), jnp.ones((2, 2))
    )
    (cond,) = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "cond"]
    sizes = sorted(len(branch.jaxpr.eqns) for branch in cond.params["branches"])
    assert sizes[0] == 0 and sizes[1] > 0


def cost(rows: int = 32, length: int = 48, width: int = 128, rounds: int = 20) -> dict[str, float]:
    """Seconds with 8 LoRA adapters over those with one, of a forward pass and of a step's gradient: medians of
    alternating runs.
    """
    config = BertConfig(1000, width, 4, 4, 4 * width, dropout=0.0, attention_dropout=0.0)
    model, method = build(config), registry.parse("lora:rank=8")
    sites, params = peft.sites(model), tiny.fill(peft.base(model)[0])
    fresh = [peft.init(method, jax.random.key(seed), sites) for seed in range(8)]
    each = [{"params": params, "peft": tiny.noise(added, seed=i)} for i, added in enumerate(fresh)]
    mask = peft.mask(method, each[0])
    own, common = stack(each, mask)
    one, rest = tree.partition(each[0], mask)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 1000, (rows, length)), jnp.int32)
    fn = lambda v, tokens: model.apply(model_variables(v), tokens)  # noqa: E731
    single = lambda one, rest, tokens: jnp.sum(fn(tree.combine(one, rest), tokens) ** 2)  # noqa: E731
    many = lambda own, common, ids, tokens: jnp.sum(apply_rows(fn, own, common, ids, tokens) ** 2)  # noqa: E731
    ids, seconds = jnp.arange(rows) % 8, {}
    runs = {
        "forward": (jax.jit(single), jax.jit(many)),
        "step": (jax.jit(jax.grad(single)), jax.jit(jax.grad(many))),
    }
    for name, pair in runs.items():
        calls = [functools.partial(pair[0], one, rest, tokens), functools.partial(pair[1], own, common, ids, tokens)]
        times = [[], []]
        for turn in range(rounds + 2):
            for call, column in zip(calls, times, strict=True):
                began = time.perf_counter()
                jax.block_until_ready(call())
                column += [time.perf_counter() - began] if turn > 1 else []
        seconds[name] = statistics.median(times[1]) / statistics.median(times[0])
    return seconds


@pytest.mark.slow
def test_eight_adapters_cost_under_1_3_times_one():
    ratios = tiny.alone("tests.peft.test_rows:cost")
    assert ratios["forward"] < 1.3 and ratios["step"] < 1.3, ratios
