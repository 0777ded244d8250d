"""Weighted sums of adapters: exact for every method that has one, refused with the reason for the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError, ModelError
from research.models.stack import unstack
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.arithmetic import combine
from research.peft.houlsby import Bottleneck
from research.peft.lora import Lora
from research.peft.merge import merge
from research.peft.sum_rules import HOWS, Rule
from research.quant.tree import quantise_tree
from tests import tiny

SIDE_BY_SIDE = ("houlsby", "pfeiffer", "parallel")
NAMES = [name for name in registry.names() if name not in ("linear_probe", "cross_attention")]
QUICK = ("lora", "dora", "houlsby", "bitfit", "prompt", "fourierft")
CASES = [
    pytest.param(registry.small(name), family, marks=() if family == "encoder" and name in QUICK else pytest.mark.slow)
    for family in tiny.CONFIGS
    for name in NAMES
    if (name, family) != ("bitfit", "decoder")
]
WEIGHTS = (0.7, -0.4, 1.2)


def adapters(case: tiny.Case, count: int = 3) -> list[dict]:
    """Realised, without a head, different in all that trains."""

    def one(seed: int) -> dict:
        variables = case.moved(seed)
        return peft.realised(case.method, {k: variables[k] for k in ("params", "peft")}, case.sites)

    return [one(20 + seed) for seed in range(count)]


@functools.lru_cache(maxsize=4)
def some(spec: str, family: str = "encoder") -> tuple[tiny.Case, list[dict], dict]:
    case = tiny.case(spec, family)
    return case, adapters(case), tiny.params(case.config)


def changes(variables: dict, base: dict) -> dict[str, np.ndarray]:
    """What an adapter changes the base's leaves by. ModelError where it is no change of them."""
    merged = tree.paths(merge(variables)["params"])
    return {path: np.asarray(merged[path], np.float64) - np.asarray(x) for path, x in tree.paths(base).items()}


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], atol=atol, err_msg=path)


def weighted(each: list[dict], base: dict, weights: tuple[float, ...]) -> dict[str, np.ndarray]:
    deltas = [changes(variables, base) for variables in each]
    return {path: sum(w * d[path] for w, d in zip(weights, deltas, strict=True)) for path in deltas[0]}


@pytest.mark.parametrize(("spec", "family"), CASES)
def test_the_sum_of_one_is_that_one_for_every_variant(spec, family):
    name, (_, (one, *_), base) = spec.partition(":")[0], some(spec, family)
    before = jax.tree.map(np.array, one)
    try:
        wanted = changes(one, base)
    except ModelError:
        wanted = None
    for how in [how for how in HOWS if not how.endswith("_svd")]:
        found = combine([one], [1.0], how, base=base)
        if name in SIDE_BY_SIDE:
            side_by_side([one], found, (1.0,))
        elif wanted is None:
            assert found is one
        else:
            close(changes(found, base), wanted)
    assert tiny.same(jax.tree.map(np.array, one), before)


@pytest.mark.parametrize(("spec", "family"), CASES)
def test_a_sum_is_exact_or_refused(spec, family):
    name, (_, each, base) = spec.partition(":")[0], some(spec, family)
    before = jax.tree.map(np.array, each)
    try:
        wanted = weighted(each, base, WEIGHTS)
    except ModelError:
        if name not in SIDE_BY_SIDE:
            with pytest.raises(
                ModelError, match="have no weighted sum: .*(weights|softmax|aligned|in them|kernel alone)"
            ):
                combine(each, WEIGHTS, base=base)
            return
        side_by_side(each, combine(each, WEIGHTS, base=base), WEIGHTS)
    else:
        linear, cat, svd = (combine(each, WEIGHTS, how, base=base) for how in ("linear", "cat", "svd"))
        for found in (linear, svd):
            close(changes(found, base), wanted, 3e-5)
        assert tiny.same(linear, cat)
        largest = max(np.abs(x).max() for x in wanted.values())
        assert largest > 1e-2, "there is something to sum"
    assert tiny.same(jax.tree.map(np.array, each), before)


def side_by_side(each: list[dict], total: dict, weights: tuple[float, ...]) -> None:
    """Each bottleneck adds the weighted sum of what those it is made of add to h."""
    bottlenecks = lambda v: tree.paths(v["peft"], is_leaf=peft.is_node).items()  # noqa: E731
    h = jnp.asarray(np.random.default_rng(0).normal(size=(5, 32)), jnp.float32)

    def adds(node: object) -> np.ndarray:
        inner, scale = (node, 1.0) if isinstance(node, Bottleneck) else (node.adapter, node.scale[0])
        return scale * jax.tree.map(lambda x: x[0], inner).change(h)

    for path, node in bottlenecks(total):
        parts = [adds(dict(bottlenecks(variables))[path]) for variables in each]
        wanted = sum(w * part for w, part in zip(weights, parts, strict=True))
        np.testing.assert_allclose(adds(node), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "specs",
    [
        ("lora:rank=2", "rslora:rank=3,targets=attn/(q|k)", "lora_fa:rank=1,alpha=3"),
        ("lora:rank=4,rank_pattern=attn/q:2|mlp/up:7,alpha_pattern=attn/v:3,targets=all", "lora:rank=3"),
        ("lora:layers=1", "lora:rank=2,layers=0"),
        ("lora:rank=2+bitfit", "lora:rank=3+bitfit:targets=attn/q"),
        ("lora:rank=2+rslora:rank=3", "pissa:rank=2+lora:rank=1"),
        ("dora:rank=3", "lora:rank=2"),
        ("dora:layers=1", "dora:layers=1,rank=3,targets=attn/q"),
        ("hira:rank=3", "hira:rank=2,scale=0.5"),
        ("shira:rank=2", "shira:rank=2,seed=1"),
    ],
)
def test_adapters_of_unlike_options_sum_exactly(specs):
    base = tiny.params(tiny.ENCODER)
    each = [adapters(tiny.case(spec, "encoder"), 1)[0] for spec in specs]
    weights = WEIGHTS[: len(specs)]
    total = combine(each, weights, base=base)
    close(changes(total, base), weighted(each, base, weights), 3e-5)
    names = {path.rpartition("/")[2].lstrip("01_") for path in tree.paths(total["peft"], is_leaf=peft.is_node)}
    same_method = specs[0].partition(":")[0] if specs[0].startswith(("dora:layers", "hira")) else "lora"
    assert names == {same_method}


def test_ranks_add_up_to_what_a_kernel_can_have():
    _, each, base = some("lora:rank=12")
    two, three = (combine(each[:n], WEIGHTS[:n], base=base)["peft"]["layers"]["attn"]["q"]["lora"] for n in (2, 3))
    assert two.a.shape == (2, 32, 24) and three.a.shape == (2, 32, 32) and np.all(np.asarray(three.scale) == 1)
    alone = combine(each[:1], [1.0], base=base)["peft"]["layers"]["attn"]["q"]["lora"]
    old = each[0]["peft"]["layers"]["attn"]["q"]["lora"]
    np.testing.assert_array_equal(alone.a, old.a * old.scale[:, None, None])
    np.testing.assert_array_equal(alone.b, old.b)


def test_subtraction_takes_an_adapter_away():
    _, (a, b, _), base = some("lora:rank=3,targets=all+bitfit")
    both = combine([a, b], [1, 1], base=base)
    close(changes(combine([both, b], [1, -1], base=base), base), changes(a, base))


def test_svd_keeps_the_largest_singular_values():
    _, each, base = some("lora:rank=4")
    cut = combine(each, WEIGHTS, "svd", rank=3)["peft"]["layers"]["attn"]["v"]["lora"]
    assert cut.a.shape[-1] == 3
    whole = weighted(each, base, WEIGHTS)["layers/attn/v/kernel"]
    for layer in range(2):
        error = np.linalg.norm(whole[layer] - cut.a[layer] @ cut.b[layer])
        rest = np.linalg.svd(whole[layer], compute_uv=False)[3:]
        np.testing.assert_allclose(error, np.linalg.norm(rest), rtol=1e-5)
    exact = combine(each, WEIGHTS, "svd")["peft"]["layers"]["attn"]["v"]["lora"]
    assert exact.a.shape[-1] == 12, "three of rank 4"


THREE = [
    np.array([[0.9, -0.1, 0.4], [-0.6, 0.2, 0.05]]),
    np.array([[-0.8, 0.3, 0.7], [-0.2, -0.5, 0.1]]),
    np.array([[-0.3, -0.6, 0.8], [0.5, 0.15, -0.9]]),
]


@pytest.mark.parametrize(
    ("prune", "elect", "density", "wanted"),
    [  # from peft.utils.merge_utils of Hugging Face PEFT 0.21.2
        ("largest", "total", 0.5, [[0.45, 1.2, -0.7 / 3], [-0.3, -0.5, 1.8]]),
        ("largest", "total", 1.0, [[-0.1, 0.575, -0.7 / 3], [-0.25, -0.5, 1.8]]),
        ("largest", "frequency", 0.5, [[0.45, 1.2, -0.7 / 3], [-0.3, -0.5, 1.8]]),
        ("largest", "frequency", 1.0, [[-0.1, 0.575, -0.7 / 3], [-0.25, -0.1, 0.0625]]),
        ("largest", None, 0.5, [[-0.35, 1.2, -0.7], [-0.3, -0.5, 1.8]]),
    ],
)
def test_pruned_sums_are_those_of_hugging_face(prune, elect, density, wanted):
    rule = Rule((0.5, 1.0, -2.0), prune, elect, density, 0, None, False)
    np.testing.assert_allclose(rule(THREE, "x"), wanted, atol=1e-6)


def test_dare_keeps_the_mean_and_follows_its_seed():
    x = np.full((200, 100), 3.0)
    rule = Rule((1.0, 1.0), "random", None, 0.3, 5, None, False)
    found = rule([x, x], "x")
    assert set(np.unique(np.round(found, 6))) == {0.0, 10.0, 20.0}, "adapters are dropped apart"
    assert abs(found.mean() - 6.0) < 0.15 and abs(np.mean(found == 20.0) - 0.09) < 0.01
    np.testing.assert_array_equal(found, rule([x, x], "x"))
    assert not np.array_equal(found, rule([x, x], "y"))
    assert not np.array_equal(found, rule._replace(seed=6)([x, x], "x"))


def test_the_svd_names_mean_the_same():
    _, each, base = some("lora:rank=2")
    for how in ("ties", "dare_linear", "dare_ties", "magnitude_prune"):
        one, two = (combine(each, WEIGHTS, name, density=0.5, rank=2) for name in (how, f"{how}_svd"))
        assert tiny.same(one, two)


@pytest.mark.parametrize("how", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_pruning_works_on_whole_changes_of_kernels_vectors_and_base_leaves(how):
    seed = {"seed": 3} if how.startswith("dare") else {}
    for spec, path in (("lora:rank=3", "attn/q/kernel"), ("bitfit", "attn/q/bias"), ("ia3", "mlp/down/kernel")):
        _, each, base = some(spec)
        total = combine(each, (1, 1, 1), how, base=base, density=0.3, **seed)
        rule = Rule((1.0,) * 3, *{"ties": ("largest", "total"), "dare_ties": ("random", "total")}.get(
            how, ("random" if seed else "largest", None)), 0.3, seed.get("seed", 0), None, False)  # fmt: skip
        site = path.rpartition("/")[0] if spec != "bitfit" else path
        for layer in range(2):
            if spec == "ia3":
                parts = [v["peft"]["layers"]["mlp"]["down"]["ia3"].l[layer] - 1 for v in each]
                found = total["peft"]["layers"]["mlp"]["down"]["ia3"].l[layer] - 1
            else:
                parts = [changes(v, base)[f"layers/{path}"][layer] for v in each]
                found = changes(total, base)[f"layers/{path}"][layer]
            np.testing.assert_allclose(found, rule(parts, f"layers_{layer}/{site}"), atol=1e-5)


@pytest.mark.parametrize("spec", ["lora:rank=3+bitfit", "ia3", "dora:rank=2", "lokr"])
@pytest.mark.parametrize("how", ["linear", "dare_ties"])
def test_scanned_and_unrolled_layers_sum_alike(spec, how):
    _, each, base = some(spec)
    loose = [{"params": unstack(v["params"]), "peft": unstack(v["peft"])} for v in each]
    options = {"density": 0.5} if how == "dare_ties" else {}
    total, other = (
        combine(each, WEIGHTS, how, base=base, **options),
        combine(loose, WEIGHTS, how, base=unstack(base), **options),
    )
    close(changes(other, unstack(base)), changes({k: unstack(total[k]) for k in total}, unstack(base)))


def test_a_quantised_base_stays_as_it_is():
    case, each, _ = some("lora:rank=2", "decoder")
    base = quantise_tree(each[0]["params"])
    each = [v | {"params": base} for v in each]
    total = combine(each, WEIGHTS, base=base)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (total["params"], base)), strict=True))
    dora = combine([v | {"params": base} for v in some("dora:rank=2", "decoder")[1]], WEIGHTS, base=base)
    assert (
        isinstance(total["peft"]["layers"]["attn"]["q"]["lora"], Lora) and "dora" in dora["peft"]["layers"]["attn"]["q"]
    )
    with pytest.raises(ModelError, match="quantised and differs"):
        other = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.int8 else x, base)
        combine([each[0], each[1] | {"params": other}], (1, 1), base=base)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lora+ia3", "several methods, one of which depends|change a bias"),
        ("lora+dora", "several methods"),
        ("lora+hira:rank=2", "several methods"),
        ("dora+full", "several methods"),
        ("houlsby+pfeiffer", "not linear in their weights"),
    ],
)
def test_methods_that_depend_on_each_other_have_no_sum(spec, words):
    case = tiny.case(spec, "encoder")
    each = [tiny.noise({k: case.variables[k] for k in ("params", "peft")}, seed=s) for s in range(2)]
    if "full" not in spec:
        each = [v | {"params": tiny.params(tiny.ENCODER)} for v in each]
    with pytest.raises(ModelError, match=words):
        combine(each, (0.5, 0.5), base=tiny.params(tiny.ENCODER))
    assert combine(each[:1], (1.0,), base=tiny.params(tiny.ENCODER)) is each[0]


def test_weights_that_cancel_a_magnitude():
    _, (one, *_), base = some("dora:rank=2")
    node = one["peft"]["layers"]["attn"]["q"]["dora"]
    shut = {"params": base, "peft": {"layers": {"attn": {"q": {"dora": node.replace(m=jnp.zeros_like(node.m))}}}}}
    with pytest.raises(ModelError, match="cancel the magnitude.*how=svd"):
        combine([shut], [1.0], base=base)
    close(changes(combine([shut], [1.0], "svd", base=base), base), changes(shut, base))


def test_heads_are_not_summed():
    _, (one, two, _), _ = some("lora:rank=2")
    a, b = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.zeros((2, 3))}
    assert combine([one | {"head": a}, two], (1, 1))["head"] is a
    assert combine([one | {"head": a}, two | {"head": dict(a)}], (1, 1))["head"] == a
    assert combine([one | {"head": a}, two | {"head": b}], (1, 1), head=1)["head"] is b
    with pytest.raises(FlagError, match="different task heads.*head=0"):
        combine([one | {"head": a}, two | {"head": b}], (1, 1))
    with pytest.raises(FlagError, match="head=1 is no adapter with a task head. Valid: 0"):
        combine([one | {"head": a}, two], (1, 1), head=1)
    with pytest.raises(FlagError, match="no adapter has a task head"):
        combine([one, two], (1, 1), head=0)


@pytest.mark.parametrize(
    ("weights", "how", "options", "words"),
    [
        ((1,), "linear", {}, "1 weights for 2 adapters"),
        ((1, float("nan")), "linear", {}, "not all finite"),
        ((1, 1), "lineal", {}, "Did you mean 'linear'"),
        ((1, 1), "linear", {"rank": 4}, "does not use rank=4.*how=svd"),
        ((1, 1), "svd", {"rank": 0}, "rank=0 is out of range"),
        ((1, 1), "svd", {"density": 0.5}, "does not use density=0.5.*how=ties"),
        ((1, 1), "ties", {"density": 0.0}, "0 < density <= 1"),
        ((1, 1), "ties", {"density": 1.5}, "0 < density <= 1"),
        ((1, 1), "ties", {"majority": "count"}, "unknown majority=count"),
        ((1, 1), "magnitude_prune", {"majority": "total"}, "does not use majority"),
        ((1, 1), "ties_svd", {"seed": 1}, "does not use seed=1.*how=dare_linear"),
        ((1, 1), "dare_ties", {"seed": -1}, "seed=-1 is out of range"),
    ],
)
def test_bad_options(weights, how, options, words):
    _, each, base = some("lora:rank=2")
    with pytest.raises(FlagError, match=words):
        combine(each[:2], weights, how, base=base, **options)


def test_what_else_is_refused():
    _, biases, base = some("bitfit")
    with pytest.raises(FlagError, match="train base leaves, such as .*bias: give base="):
        combine(biases, (1, 1, 1))
    with pytest.raises(FlagError, match="rank=3 has no use"):
        combine(biases, (1, 1, 1), "svd", base=base, rank=3)
    with pytest.raises(ModelError, match="not on one base"):
        combine([biases[0], some("layernorm", "decoder")[1][0]], (1, 1), base=base)
    with pytest.raises(FlagError, match="0 weights for 0 adapters"):
        combine([], [])
