"""What later work stands on: quantised bases, many devices, no frozen gradients, several runs in one program."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.errors import FlagError
from research.peft import method as peft
from research.peft import tree
from research.peft.merge import merge
from research.quant.int8 import Int8
from research.quant.tree import quantise_axes, quantise_tree
from research.train import mesh as meshes
from research.train import state as states
from research.train import step as steps
from tests import tiny

SGD = optax.sgd(0.1)  # AdamW would blow up rounding where a gradient is zero but for it
PAIRS = [
    ("lora:targets=all", "encoder"),
    ("lora:targets=all", "decoder"),
    ("prefix", "encoder"),
    ("prefix", "decoder"),
    ("bitfit", "encoder"),
]
QUICK = [("lora:targets=all", "decoder"), ("prefix", "encoder")]
pairs = pytest.mark.parametrize(
    ("spec", "family"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)


def is_int8(x) -> bool:
    return isinstance(x, Int8)


@functools.cache
def setup(spec: str, family: str, int8: bool) -> tiny.Case:
    """A case at a random point, on an int8 base or on the same numbers dequantised."""
    case, point = tiny.Case(spec, family), tiny.case(spec, family).point
    params = quantise_tree(point["params"])
    if not int8:
        params = jax.tree.map(lambda x: x.dequantise(jnp.float32) if is_int8(x) else x, params, is_leaf=is_int8)
    case.variables = point | {"params": params}
    return case


@functools.cache
def trained(spec: str, family: str, int8: bool) -> tuple:
    """Three steps of plain SGD on one device: what trained, and the losses."""
    case, losses = setup(spec, family, int8), []
    state, frozen = case.start(tx=SGD)
    step = jax.jit(case.stepper(SGD))
    for i in range(3):
        state, metrics = step(state, frozen, tiny.micro(tiny.batch(seed=i), 1))
        losses.append(metrics["loss"])
    return state.trainable, losses


@pairs
def test_a_step_on_an_int8_base_is_a_step_on_the_dequantised_one(spec, family):
    codes = tree.paths(setup(spec, family, True).variables["params"], is_leaf=is_int8)
    assert sum(map(is_int8, codes.values())) >= 6
    (ours, losses), (theirs, expected) = trained(spec, family, True), trained(spec, family, False)
    tiny.close(losses, expected, 1e-5)
    tiny.close(jax.tree.leaves(ours), jax.tree.leaves(theirs), 1e-5)
    assert losses[0] != losses[2]


def test_a_quantised_kernel_does_not_train():
    case = tiny.case("full", "encoder")
    with pytest.raises(FlagError, match="is quantised and can't train"):
        peft.mask(case.method, case.variables | {"params": quantise_tree(case.variables["params"])})


def test_merging_into_an_int8_base_gives_a_float_one():
    case = tiny.case("lora:targets=all", "decoder")
    variables = case.point | {"params": quantise_tree(case.point["params"])}
    merged = merge(variables)
    assert not any(map(is_int8, jax.tree.leaves(merged["params"], is_leaf=is_int8)))
    np.testing.assert_allclose(case.forward(merged), case.forward(variables), atol=1e-5)


@functools.cache
def eight():
    assert jax.device_count() == 8
    return meshes.make_mesh("data:2,fsdp:2,tensor:2")


def axes(case, quantise):
    """Logical axes of all variables; a head has none."""
    base = peft.base(case.model)[1]
    out = {"params": quantise_axes(base) if quantise else base, "peft": peft.init_axes(case.method, case.sites)}
    if case.has_head:
        out["head"] = tree.constant(case.variables["head"], None)
    return out


@pairs
@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_eight_devices_equal_one(spec, family, int8):
    case, (expected, expected_losses) = setup(spec, family, int8), trained(spec, family, int8)
    state, frozen = case.start(tx=SGD)
    names, losses = axes(case, int8), []
    batches = [tiny.micro(tiny.batch(seed=i), 1) for i in range(3)]
    with meshes.use(eight()) as mesh:
        places = (
            meshes.state_shardings(names, state, mesh),
            meshes.shardings(names, frozen, mesh),
            meshes.batch_sharding(mesh),
        )
        step = steps.compile(case.stepper(SGD), state, frozen, batches[0], places)
        state, frozen = meshes.shard(state, places[0]), meshes.shard(frozen, places[1])
        for batch in batches:
            state, metrics = step(state, frozen, jax.device_put(batch, places[2]))
            losses.append(metrics["loss"])
    tiny.close(losses, expected_losses, 1e-5)
    tiny.close(state.trainable, expected, 1e-5)
    # The kernels are in pieces, and so is most of what the method added beside them.
    kernels = {p: x for p, x in tree.paths(frozen).items() if re.search(r"layers/.*kernel(/codes)?$", p)}
    assert kernels and all(x.addressable_shards[0].data.nbytes == x.nbytes // 4 for x in kernels.values())
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(frozen))
    assert here < 0.45 * tree.nbytes(frozen)
    if "lora" in spec:
        for path, x in tree.paths(state.trainable["peft"]).items():
            assert x.addressable_shards[0].data.nbytes == x.nbytes // 2, path


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_constraints_are_in_the_program_under_a_mesh_only(family):
    case, data = tiny.case("lora", family), tiny.batch()
    variables = {k: case.point[k] for k in ("params", "peft")}

    def constraints(context):
        with context:
            apply = lambda v: case.model.apply(v, data["tokens"], data["mask"])  # noqa: E731
            eqns = tiny.equations(jax.make_jaxpr(apply)(variables).jaxpr)
        return [e.params["sharding"].spec for e in eqns if e.primitive.name == "sharding_constraint"]

    inside = constraints(meshes.use(eight()))
    assert len(inside) == 1 and inside[0][0] == ("data", "fsdp"), "one in the body of the scan, over the batch"
    assert constraints(contextlib.nullcontext()) == []


def frozen_products(case) -> list[tuple]:
    """The products of the compiled step whose result has a frozen kernel's shape and sums over all tokens."""
    state, frozen = case.start()
    kernels = {tuple(sorted(x.shape[-2:])) for p, x in tree.paths(case.variables).items() if p.endswith("/kernel")}
    text = case.step.lower(state, frozen, tiny.micro(tiny.batch(), 1)).compile().as_text()
    shapes = {
        name: tuple(map(int, dims.split(","))) for name, dims in re.findall(r"%?([\w.\-]+) = \w+\[([\d,]+)\]", text)
    }
    found, seen = [], 0
    for out, left, contracted in re.findall(
        r"= \w+\[([\d,]*)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+), .*?lhs_contracting_dims=\{([\d,]*)\}", text
    ):
        seen += 1
        size = int(np.prod([shapes[left][int(i)] for i in contracted.split(",") if i]))
        out = tuple(map(int, out.split(",")))
        if size == tiny.ROWS * tiny.LENGTH and tuple(sorted(n for n in out if n > 1)) in kernels:
            found.append((out, size))
    assert seen > 10, "the parser sees the products"
    return found


@pytest.mark.parametrize("family", ["encoder", pytest.param("decoder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "spec",
    ["lora:targets=all", "full"]
    + [pytest.param(s, marks=pytest.mark.slow) for s in ("houlsby:width=20", "prefix", "ia3")],
)
def test_no_product_sums_over_tokens_into_a_frozen_kernel(spec, family, scan):
    found = frozen_products(tiny.case(spec, family, scan=scan))
    if spec == "full":
        assert len(found) >= (6 if scan else 12), "the check fires"
    else:
        assert found == []


@pytest.mark.parametrize(
    ("how", "spec"),
    [
        ("map", "lora"),
        pytest.param("vmap", "lora", marks=pytest.mark.slow),
        pytest.param("map", "lora:rank=2+prefix:length=3,hidden=8+bitfit", marks=pytest.mark.slow),
    ],
)
def test_several_runs_in_one_program(how, spec):
    case = tiny.case(spec, "encoder")
    points = [case.variables | {"peft": tiny.noise(case.variables["peft"], 0.02, s)} for s in range(2)]
    step = steps.over_seeds(case.stepper(SGD), how)
    batches = [tiny.micro(tiny.batch(seed=s), 1) for s in range(2)]
    both = states.stack([case.start(p, SGD)[0] for p in points])
    frozen = case.start(points[0], SGD)[1]
    both, metrics = jax.jit(step)(both, frozen, jax.tree.map(lambda *xs: np.stack(xs), *batches))
    single = jax.jit(case.stepper(SGD))
    for i, (point, batch) in enumerate(zip(points, batches, strict=True)):
        alone, one = single(case.start(point, SGD)[0], frozen, batch)
        tiny.close(states.take(both, i).trainable, alone.trainable, 1e-5)
        np.testing.assert_allclose(metrics["loss"][i], one["loss"], rtol=1e-5)
