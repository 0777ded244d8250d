"""Chains: unions of subtrees and masks, each part by itself, in either order."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError, ModelError
from research.models.stack import unstack
from research.nn.linear import Linear
from research.nn.on import On
from research.nn.sites import LinearNode, Node
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.compose import chain
from research.peft.lora import lora
from research.peft.merge import merge
from tests import tiny

KV = "attn/(k|v)"
ORDERS = [f"ia3+lora:targets={KV}", f"lora:targets={KV}+ia3"]
ALL = "lora+ia3+prefix:length=3,hidden=0+prompt:length=2+houlsby:width=4,norms=false+bitfit"


@pytest.mark.parametrize("spec", [*ORDERS, f"lora:targets={KV}+ia3+lora:rank=2,targets=all"])
def test_nodes_at_one_place_merge_to_what_they_do(spec):
    case = tiny.case(spec, "encoder")
    here = case.variables["peft"]["layers"]["attn"]["k"]
    assert len(here) == len(registry.split(spec)), "they do meet"
    merged = merge(case.point)
    np.testing.assert_allclose(case.forward(merged), case.forward(case.point), atol=1e-5)


def test_an_output_that_reads_its_input_folds_before_the_input_turns():
    case = tiny.case("oft:block_size=8,layers=0+lokr:rank=2", "encoder")
    merged = merge(case.point)
    np.testing.assert_allclose(case.forward(merged), case.forward(case.point), atol=1e-5)


def test_both_orders_are_the_same_function():
    """A scale is on the whole output, whichever comes first."""
    one, two = (tiny.case(spec, "encoder") for spec in ORDERS)

    def swap(added):
        if isinstance(added, Node) or not isinstance(added, dict):
            return added
        return {{"0_ia3": "1_ia3", "1_lora": "0_lora"}.get(k, k): swap(v) for k, v in added.items()}

    other = swap(one.point["peft"])
    assert tree.constant(other, 0) == tree.constant(two.point["peft"], 0)
    np.testing.assert_allclose(two.forward(two.point | {"peft": other}), one.forward(one.point), atol=1e-5)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_prefix_and_prompt_in_either_order(family):
    parts = ["prefix:length=3,hidden=0", "prompt:length=2"]
    one, two = (tiny.case("+".join(order), family) for order in (parts, parts[::-1]))
    flat = {re.sub(r"/\d_", "/", path): leaf for path, leaf in tree.paths(one.point["peft"]).items()}
    added = tree.map_with_path(lambda path, _: flat[re.sub(r"/\d_", "/", path)], two.point["peft"])
    np.testing.assert_allclose(two.forward(two.point | {"peft": added}), one.forward(one.point), atol=1e-5)


class Turn(LinearNode):
    """x M, then W + N, then y M: no two of them commute."""

    m: jax.Array
    n: jax.Array
    trained = ("m", "n")

    def input(self, x, rng):
        return x @ self.m

    def weight(self, w, rng):
        return w @ self.m + self.n

    def output(self, x, y, rng):
        return y @ self.m + self.n[0]

    def fold_input(self, w):
        return self.m @ w

    def fold_output(self, w, bias):
        return w @ self.m, bias @ self.m + self.n[0]


def test_hooks_that_do_not_commute_fold_in_their_order():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"q": {"kernel": draw(3, 3), "bias": draw(3)}}
    added = {"q": {f"{i}_turn": Turn(m=draw(3, 3), n=draw(3, 3)) for i in range(3)}}
    x = draw(5, 3)
    module = Linear(3, ("embed", "heads"))
    merged = merge({"params": params, "peft": added})
    expected = module.apply({"params": params["q"], "peft": added["q"]}, x)
    np.testing.assert_allclose(module.apply({"params": merged["params"]["q"]}, x), expected, rtol=1e-3, atol=1e-3)
    assert "peft" not in merged


def test_keys_carry_the_place():
    added = tiny.case(ORDERS[0], "encoder").variables["peft"]
    assert set(added["layers"]["attn"]["k"]) == {"0_ia3", "1_lora"}
    many = "+".join(["lora:rank=1,targets=attn/q"] * 11)
    keys = list(
        peft.init(registry.parse(many), jax.random.key(0), tiny.case("lora", "encoder").sites)["layers"]["attn"]["q"]
    )
    assert sorted(keys) == keys == [f"{i:02d}_lora" for i in range(11)]


def test_parts_do_not_share_their_numbers():
    added = peft.init(chain(lora(rank=2), lora(rank=2)), jax.random.key(0), tiny.case("lora", "encoder").sites)
    q = added["layers"]["attn"]["q"]
    assert not np.array_equal(q["0_lora"].a, q["1_lora"].a)


def test_masks_are_the_union_of_the_parts():
    case = tiny.case(ALL, "encoder")
    union = {path for path, m in tree.paths(case.mask).items() if tree.trains(m)}
    alone = set()
    for number, spec in enumerate(registry.split(ALL)):
        part = tiny.case(spec, "encoder")
        paths = [path for path, m in tree.paths(part.mask).items() if tree.trains(m)]
        alone |= {re.sub(r"/(?=\w+/\w+$)", f"/{number}_", p) if p.startswith("peft/") else p for p in paths}
    assert union == alone
    assert any(path.endswith("q/bias") for path in union)


@pytest.mark.parametrize("spec", ["houlsby+bitfit", "layernorm+layernorm", "full+bitfit:layers=0"])
def test_two_parts_do_not_train_one_leaf(spec):
    with pytest.raises(FlagError, match="parts 1 and 2 of the chain both train .*: leave it to one of them"):
        _ = tiny.Case(spec, "encoder").mask


def test_two_parts_may_share_a_leaf_by_layers():
    mask = tiny.case("bitfit:layers=0+full:layers=1", "encoder").mask["params"]["layers"]["attn"]["q"]
    assert mask["bias"].all() and mask["kernel"].tolist() == [[[False]], [[True]]]


OTHERS = ("ia3", "houlsby:norms=false", "ptuning_v2:length=3")


@pytest.mark.parametrize("family", ["encoder", pytest.param("decoder", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "spec",
    ["lora:targets=all", *(pytest.param(s, marks=pytest.mark.slow) for s in OTHERS)],
)
def test_layers_are_the_method_in_those_layers_only(spec, family):
    """Two halves are the whole, each is less, and an unrolled model drops what is off."""
    halves = [tiny.case(f"{spec}{',' if ':' in spec else ':'}layers={i}", family) for i in (0, 1)]
    whole, unrolled = tiny.case(spec, family), tiny.case(spec, family, scan=False)
    for i, half in enumerate(halves):
        point = half.point | {"peft": tiny.noise(half.variables["peft"])}  # what is off is moved too
        inner = jax.tree.map(lambda n: n.node if isinstance(n, On) else n, point["peft"], is_leaf=peft.is_node)
        added = unstack(inner)
        del added[f"layers_{1 - i}"]
        expected = unrolled.forward({"params": unstack(half.point["params"]), "peft": added})
        np.testing.assert_allclose(half.forward(point), expected, atol=1e-5)
        assert np.abs(expected - whole.forward(whole.point | {"peft": inner})).max() > 1e-3
    counts = [tree.count(half.variables, half.mask) for half in halves]
    heads = tree.count(whole.variables.get("head", {}))
    assert sum(counts) - 2 * heads == tree.count(whole.variables, whole.mask) - heads
    sizes = [peft.parameters({k: c.variables[k] for k in ("params", "peft")}) for c in (*halves, whole)]
    base = tree.count(whole.variables["params"])
    assert sizes[0] + sizes[1] - base == sizes[2]


@pytest.mark.parametrize("layers", ["", "a", "0-", "3-1", "1-2-3", "0|x"])
def test_layers_that_are_none(layers):
    with pytest.raises(FlagError, match="names no layers. Valid: 0-3"):
        registry.parse(f"lora:layers={layers}")


def test_layers_that_the_model_has_not():
    with pytest.raises(FlagError, match="layers=1-2 is out of range: the model has layers 0-1"):
        _ = tiny.Case("lora:layers=1-2", "encoder").variables


def test_a_part_that_cannot_merge_keeps_its_place():
    case = tiny.case(ALL, "encoder")
    with pytest.raises(ModelError, match="Bottleneck, Prefix, Shift, VirtualTokens can't be merged"):
        merge(case.point)
    rest = merge(case.point, partial=True)
    kinds = {type(n).__name__ for n in tree.paths(rest["peft"], is_leaf=peft.is_node).values()}
    assert kinds == {"Bottleneck", "Prefix", "Shift", "VirtualTokens"}
    np.testing.assert_allclose(case.forward(rest), case.forward(case.point), atol=1e-5)


def test_realise_sees_its_own_part_only():
    case = tiny.case("lora:rank=2+prefix:length=3,hidden=8", "decoder")
    added = peft.realised(case.method, case.point, case.sites)["peft"]
    assert set(added) == {"layers", "embed"}, "the MLP is gone"
    assert set(added["layers"]["attn"]["kv"]) == {"1_prefix"} and set(added["embed"]["prompt"]) == {"1_prefix"}
    assert tiny.same(added["layers"]["attn"]["q"], case.point["peft"]["layers"]["attn"]["q"])


def hooked(name: str, factor: float) -> peft.Method:
    """A LoRA with every optional function, each leaving a trace of `factor`."""
    own = lora(rank=2, targets=f"attn/{name}")
    node = lambda v: v["peft"]["layers"]["attn"][name]["lora"]  # noqa: E731
    put = lambda v, n: v | {"peft": {"layers": {"attn": {name: {"lora": n}}}}}  # noqa: E731
    return own._replace(
        fit=lambda rng, v, loss, batches: put(v, node(v).replace(b=node(v).b + factor)),
        penalty=lambda v, rng: factor * jnp.sum(node(v).a),
        update=lambda added, grads, step: tree.map_with_path(
            lambda p, x: x * factor if p.endswith("scale") else x, added
        ),
        rates=lambda v: tree.map_with_path(lambda p, _: factor if p.endswith("/b") else 1.0, v),
    )


def test_every_optional_function_reaches_its_own_part():
    case = tiny.case("lora", "encoder")
    both = chain(hooked("q", 2.0), hooked("v", 3.0), lora(rank=2, targets="attn/k"))
    added = peft.init(both, jax.random.key(0), case.sites)
    variables = {"params": tiny.params(case.config), "peft": added}
    at = lambda t, name, number: t["layers"]["attn"][name][f"{number}_lora"]  # noqa: E731

    fitted = both.fit(jax.random.key(0), variables, None, [])["peft"]
    assert [float(at(fitted, n, i).b.mean()) for i, n in enumerate("qvk")] == [2.0, 3.0, 0.0]

    sums = [float(jnp.sum(at(added, n, i).a)) for i, n in enumerate("qv")]
    np.testing.assert_allclose(both.penalty(variables, jax.random.key(0)), 2 * sums[0] + 3 * sums[1], rtol=1e-5)

    grads = tree.partition(variables, peft.mask(both, variables))[0]["peft"]
    updated = both.update(added, grads, jnp.zeros((), jnp.int32))
    assert jax.tree.structure(updated) == jax.tree.structure(added)
    assert [float(at(updated, n, i).scale[0] / at(added, n, i).scale[0]) for i, n in enumerate("qvk")] == [
        2.0,
        3.0,
        1.0,
    ]

    rates = tree.paths(both.rates(variables))
    factors = {path: r for path, r in rates.items() if r != 1.0}
    assert factors == {"peft/layers/attn/q/0_lora/b": 2.0, "peft/layers/attn/v/1_lora/b": 3.0}
    assert chain(lora(), lora()).penalty is None and chain(lora(), lora()).update is None


def test_trees_that_claim_one_place_twice_are_refused():
    with pytest.raises(ValueError, match="/a/b"):
        tree.merge_dicts({"a": {"b": 1}}, {"a": {"b": 2}})
    assert tree.merge_dicts({"a": {"b": 1}}, {"a": {"c": 2}}, {"d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
