"""LoRA's family: counts, closed forms at one kernel, and golden values from Hugging Face PEFT."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.errors import FlagError
from research.nn.dot import LowRank, dot, low_rank
from research.nn.param import dense
from research.nn.sites import Site
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.adalora import largest
from research.peft.eva import Probe
from research.peft.lora import Lora
from research.quant.int8 import quantise
from research.tasks.loss import Loss
from tests import tiny
from tests.peft.test_counts import count
from tests.peft.test_formulas import norm

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "lora.npz")
D_IN, D_OUT, L = 7, 6, 3


def site(d_in: int = D_IN, d_out: int = D_OUT, layers: int | None = None) -> Site:
    return Site("linear", (d_in, d_out), ("embed", "heads"), jnp.zeros(() if layers is None else (layers,)))


def kernels(layers: int | None = None, seed: int = 0) -> jax.Array:
    shape = (D_IN, D_OUT) if layers is None else (layers, D_IN, D_OUT)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fitted(spec: str, kernel, layers: int | None = None):
    """The node of a method at one kernel, fitted."""
    method = registry.parse(spec)
    added = peft.init(method, jax.random.key(1), {"attn/q": site(layers=layers)})
    variables = {"params": {"attn": {"q": {"kernel": kernel}}}, "peft": added}
    variables = method.fit(jax.random.key(2), variables, None, None)
    return variables["peft"]["attn"]["q"][spec.partition(":")[0]]


def close(a, b, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=atol)


# ------------------------------------------------------------------------------------------------- counts and options


ROWS = [
    ("lora", 460_800),
    ("lora:targets=all", 2_442_240),
    ("lora:rank=16,targets=all", 4_884_480),
    ("lora:rank_pattern=attn/q:4|attn/v:16", 30 * (4 * (576 + 576) + 16 * (576 + 192))),
    ("rslora", 460_800),
    ("lora_plus", 460_800),
    ("lora_fa", 30 * 8 * (576 + 192)),
    ("pissa", 460_800),
    ("olora:targets=all", 2_442_240),
    ("eva", 460_800),
    ("dora", 483_840),
    ("dora:targets=all", 2_597_760),
    ("adalora", 691_920),
    ("adalora:init_rank=12", 691_920),
    ("vera", 38_400),
]


@pytest.mark.parametrize(("spec", "trained"), ROWS)
def test_counts_on_smollm2(spec, trained):
    assert count("smollm2-135m", spec) == trained


BAD = {
    "lora:rank_pattern=attn/k:4": r"rank_pattern=attn/k:4 matches no targeted site\. Did you mean 'attn/v'",
    "lora:alpha_pattern=attn/q:4|mlp/up:2": "alpha_pattern=mlp/up:2 matches no targeted site",
    "lora:rank_pattern=attn/q": "'attn/q' is not of the form pattern:int, such as mlp/up:16",
    "lora:rank_pattern=:4": "':4' is not of the form",
    "lora:rank_pattern=attn/q:4.5": "'attn/q:4.5' is not of the form pattern:int",
    "lora:alpha_pattern=attn/q:inf": "'attn/q:inf' is not of the form pattern:float",
    "lora:rank_pattern=attn/(q:4": "is not a regular expression",
    "lora:rank_pattern=attn/q:0": "rank_pattern=0 is out of range: the least value is 1",
    "lora:alpha_pattern=attn/q:0": "alpha=0.0 would switch the update off",
    "lora:rank_pattern=attn/v:17": r"rank=17 is above the smaller side of a kernel \[32, 16\]: at most 16",
    "rslora:alpha=0": "alpha=0.0 would switch the update off",
    "lora_plus:ratio=0": "ratio=0.0 is out of range",
    "lora_fa:seed=-1": "seed=-1 is out of range",
    "pissa:rank=17": "rank=17 is above the smaller side",
    "olora:rank=0": "rank=0 is out of range",
    "eva:rho=0.5": "rho=0.5 is out of range: the least value is 1",
    "eva:batches=0": "batches=0 is out of range",
    "eva:rank=9,rho=2": "rank=18 is above the smaller side",
    "dora:targets=attn/w": "targets=attn/w matches no linear site",
    "adalora:rank=8,init_rank=4": "init_rank=4 is out of range: the least value is 8",
    "adalora:rank=12": "init_rank=18 is above the smaller side of a kernel",
    "adalora:steps=100,tinit=50": "tinit=50 and tfinal=50 leave none of steps=100 .* such as tinit=10,tfinal=50",
    "adalora:beta2=1": "beta2=1.0 is out of range: valid are 0 <= beta2 < 1",
    "adalora:every=0": "every=0 is out of range",
    "adalora:orthogonality=-1": "orthogonality=-1.0 is out of range",
    "vera:rank=0": "rank=0 is out of range",
    "vera:d_init=0": "would never train",
}


@pytest.mark.parametrize("spec", BAD)
def test_options_that_are_refused(spec):
    with pytest.raises(FlagError, match=BAD[spec]):
        peft.init(registry.parse(spec), jax.random.key(0), tiny_sites())


@functools.cache
def tiny_sites() -> dict:
    return peft.sites(tiny.build(tiny.DECODER))


def test_patterns_change_rank_and_alpha_of_some_sites():
    spec = "lora:rank=2,alpha=6,targets=all,rank_pattern=attn/(q|(k|v)):4|attn/.*:3|mlp/up:5,alpha_pattern=attn/q:10"
    nodes = tree.paths(peft.init(registry.parse(spec), jax.random.key(0), tiny_sites()), is_leaf=peft.is_node)
    found = {path.split("/", 1)[1]: (n.a.shape[-1], n.b.shape[-2], float(n.scale[0])) for path, n in nodes.items()}
    assert found == {
        "attn/q/lora": (4, 4, 2.5),
        "attn/k/lora": (4, 4, 1.5),
        "attn/v/lora": (4, 4, 1.5),
        "attn/o/lora": (3, 3, 2.0),
        "mlp/gate/lora": (2, 2, 3.0),
        "mlp/up/lora": (5, 5, pytest.approx(1.2)),
        "mlp/down/lora": (2, 2, 3.0),
    }
    plain = peft.init(registry.parse("lora:rank=2,alpha=6,targets=all"), jax.random.key(0), tiny_sites())
    down = nodes["layers/mlp/down/lora"]
    assert tiny.same(down, plain["layers"]["mlp"]["down"]["lora"]), "a pattern changes no other site"


# --------------------------------------------------------------------------------------------- rsLoRA, LoRA+, LoRA-FA


def test_rslora_scales_by_the_root_of_the_rank():
    init = lambda spec: peft.init(registry.parse(spec), jax.random.key(0), {"attn/q": site()})  # noqa: E731
    scale = lambda spec: init(spec)["attn"]["q"]["rslora"].scale  # noqa: E731
    close(scale("rslora:rank=4,alpha=6"), 3.0)
    close(scale("rslora:rank=4,alpha=6,rank_pattern=q:1"), 6.0)


def test_lora_plus_moves_b_faster():
    method, sites = registry.parse("lora_plus:rank=2,ratio=8+lora:rank=2"), {"attn/q": site(layers=L)}
    added = peft.init(method, jax.random.key(0), sites)
    variables = {"params": {"kernel": kernels()}, "peft": added, "head": {"bias": jnp.zeros(2)}}
    rates = method.rates(variables)
    assert jax.tree.structure(rates) == jax.tree.structure(variables)
    expected = tree.constant(variables, 1.0)
    expected["peft"]["attn"]["q"]["0_lora_plus"] = Lora(1.0, 8.0, 1.0)
    assert rates == expected


def test_lora_fa_freezes_an_a_that_no_adapter_need_store():
    def nodes(options: str, key: int) -> dict:
        method = registry.parse(f"lora_fa:rank=2{options}")
        return {"params": {}, "peft": peft.init(method, jax.random.key(key), {"attn/q": site(), "attn/v": site()})}

    one, other = nodes("", 0), nodes(",seed=1", 0)
    assert tiny.same(one, nodes("", 1)), "the run's key has no say"
    q, v = (one["peft"]["attn"][name]["lora_fa"] for name in "qv")
    assert not np.array_equal(q.a, v.a) and not np.array_equal(q.a, other["peft"]["attn"]["q"]["lora_fa"].a)
    mask = tree.paths(peft.mask(registry.parse("lora_fa:rank=2"), one))
    assert [path for path, trains in mask.items() if trains] == [f"peft/attn/{name}/lora_fa/b" for name in "qv"]


# -------------------------------------------------------------------------------------------------- PiSSA and OLoRA


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_starts_are_those_of_hugging_face(name):
    w = jnp.asarray(GOLDEN["kernel"])
    node = fitted(f"{name}:rank=2,alpha=3", w)
    a, b = GOLDEN[f"{name}_a"], GOLDEN[f"{name}_b"]
    close(w - 1.5 * node.a0 @ node.b0, GOLDEN[f"{name}_residual"])
    signs = np.sign(np.sum(np.asarray(node.a) * a, axis=0))
    close(node.a * signs, a)
    close(node.b * signs[:, None], b)
    np.testing.assert_array_equal(dense(node.weight(w, None), jnp.float32), w)


@pytest.mark.parametrize("alpha", [5.0, -5.0])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_each_layer_starts_from_its_own_kernel_int8_too(name, alpha):
    quantised = quantise(kernels(L))
    node = fitted(f"{name}:rank=2,alpha={alpha}", quantised, L)
    for i, w in enumerate(np.asarray(quantised.dequantise(jnp.float32), np.float64)):
        start = np.asarray(node.a[i] @ node.b[i], np.float64)
        if name == "pissa":
            u, s, vt = np.linalg.svd(w)
            close(alpha / 2 * start, (u[:, :2] * s[:2]) @ vt[:2])
        else:
            q, r = np.linalg.qr(w.T)
            close(start, (q[:, :2] @ r[:2]).T)
    one = jax.tree.map(lambda x: x[1], (node, quantised))
    kernel = one[0].weight(one[1], None)
    assert isinstance(kernel, LowRank) and kernel.w is one[1] and kernel.a.shape == (D_IN, 4), "two thin products"
    np.testing.assert_array_equal(dense(kernel, jnp.float32), one[1].dequantise(jnp.float32))
    moved = one[0].replace(a=one[0].a + 1, b=one[0].b * 2)
    update = (moved.a @ moved.b - one[0].a @ one[0].b) * alpha / 2
    close(dense(moved.weight(one[1], None), jnp.float32), one[1].dequantise(jnp.float32) + update, 1e-4)


def test_half_precision_rounds_no_small_step_away():
    node, x = fitted("pissa:rank=2", kernels()), jnp.asarray(rows_of(0, 1.0), jnp.bfloat16)
    step = jnp.asarray(np.random.default_rng(0).normal(size=node.a.shape) * 1e-4, jnp.float32)
    w = jnp.zeros((D_IN, D_OUT), jnp.bfloat16)
    y = dot(x, node.replace(a=node.a + step).weight(w, None)).astype(jnp.float32)
    expected = x.astype(jnp.float32) @ (step @ node.b) * node.scale
    assert np.abs(y - expected).max() < 0.02 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------------------- DoRA


def golden_dora():
    node = fitted("dora:rank=2,alpha=3", jnp.asarray(GOLDEN["kernel"]))
    return node, node.replace(**{name: jnp.asarray(GOLDEN[f"dora_{name}"]) for name in ("a", "b", "m")})


def test_dora_is_hugging_faces():
    fresh, node = golden_dora()
    close(fresh.m, GOLDEN["dora_start"])
    w, x, slope = (jnp.asarray(GOLDEN[name]) for name in ("kernel", "dora_x", "dora_slope"))
    close(dense(fresh.weight(w, None), jnp.float32), w, 1e-6)
    output = lambda node: dot(x, node.weight(w, None)) + GOLDEN["dora_bias"]  # noqa: E731
    close(output(node), GOLDEN["dora_y"])
    grads = jax.grad(lambda node: jnp.sum(output(node) * slope))(node)
    for name in ("a", "b", "m"):
        close(getattr(grads, name), GOLDEN[f"dora_grad_{name}"])


def test_dora_in_a_chain_takes_the_kernel_as_it_finds_it():
    _, node = golden_dora()
    w = jnp.asarray(GOLDEN["kernel"])
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((D_IN, 3), (3, D_OUT)))

    def directions(v):
        v = np.asarray(v, np.float64) + 1.5 * np.asarray(node.a @ node.b)
        return np.asarray(node.m) * v / np.linalg.norm(v, axis=0)

    close(dense(node.weight(low_rank(w, a, b), None), jnp.float32), directions(w + a @ b))
    close(dense(low_rank(node.weight(w, None), a, b), jnp.float32), directions(w) + np.asarray(a @ b))
    quantised = quantise(w)
    close(dense(node.weight(quantised, None), jnp.float32), directions(quantised.dequantise(jnp.float32)))
    with pytest.raises(FlagError, match="dora can't follow a node with dropout"):
        node.weight(low_rank(w, a, b, 0.5, jax.random.key(0)), jax.random.key(1))


def test_dora_keeps_a_column_of_zeros():
    w = kernels().at[:, 2].set(0.0)
    node = fitted("dora:rank=2", w)

    def total(node):
        return jnp.sum(dot(jnp.ones((4, D_IN)), node.weight(w, None)) ** 2)

    value, grads = jax.value_and_grad(total)(node)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    close(dense(node.weight(w, None), jnp.float32), w, 1e-6)


# ---------------------------------------------------------------------------------------------------------- AdaLoRA


STEPS, TINIT, TFINAL, EVERY = 12, 2, 3, 2  # of tests/golden/make_lora_golden.py
ADALORA = f"adalora:rank=1,init_rank=3,alpha=4,targets=q|v,steps={STEPS},tinit={TINIT},tfinal={TFINAL},every={EVERY}"


def budget(step: int, start: int, target: int) -> int:
    """The paper's cubic schedule, after `step` steps."""
    if step <= TINIT:
        return start
    left = max(0.0, 1 - (step - TINIT) / (STEPS - TFINAL - TINIT))
    return int((start - target) * left**3 + target)


def test_adalora_is_hugging_faces():
    method = registry.parse(ADALORA + ",orthogonality=0.5")
    added = peft.init(method, jax.random.key(0), {"q": site(), "v": site()})
    golden = lambda key: jnp.asarray(GOLDEN[f"adalora_{key}"])  # noqa: E731

    def with_parts(added: dict, part) -> dict:
        """Every kernel's p, lam and q by `part(kernel, name)`."""
        return {
            k: {"adalora": added[k]["adalora"].replace(**{name: part(k, name) for name in ("p", "lam", "q")})}
            for k in "qv"
        }

    added = with_parts(added, lambda k, name: golden(f"{k}_{name}"))
    y = dot(golden("x"), added["q"]["adalora"].weight(jnp.asarray(GOLDEN["kernel"]), None)) + GOLDEN["dora_bias"]
    close(y, golden("y"))
    close(method.penalty({"peft": added}, None), golden("penalty"))
    update, holes = jax.jit(method.update), tree.constant(added, None)
    for i in range(STEPS):
        grads = with_parts(holes, lambda k, name, i=i: golden(f"{k}_{name}_grads")[i])
        down = lambda k, name, a=added, g=grads: (  # noqa: E731
            getattr(a[k]["adalora"], name) - 0.1 * getattr(g[k]["adalora"], name)
        )
        added = update(with_parts(added, down), grads, jnp.asarray(i))
        for k in "qv":
            close(added[k]["adalora"].lam, golden(f"{k}_lams")[i])


@pytest.mark.parametrize("off", [False, True])
def test_adalora_meets_the_cubic_budget_over_all_layers(off):
    """Of those that have a gradient."""
    method = registry.parse(ADALORA)
    added = peft.init(method, jax.random.key(0), {"layers/q": site(layers=L), "v": site()})
    rng, counts, kept = np.random.default_rng(0), [], []
    update = jax.jit(method.update)
    silent = lambda n: jax.tree.map(lambda x: x.at[0].set(jnp.zeros((), x.dtype)), n)  # noqa: E731
    for step in range(STEPS + 3):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), added)
        if off:
            grads["layers"]["q"]["adalora"] = silent(grads["layers"]["q"]["adalora"])
        grow = lambda n: n.replace(lam=n.lam + 1.0)  # noqa: E731
        added = update(jax.tree.map(grow, added, is_leaf=peft.is_node), grads, jnp.asarray(step))
        nodes = [added["v"]["adalora"], jax.tree.map(lambda x: x[int(off) :], added["layers"]["q"]["adalora"])]
        counts.append(sum(int(jnp.sum(n.lam != 0)) for n in nodes))
        kept.append(np.concatenate([np.ravel(n.state["kept"]) for n in nodes]).tolist())
    assert all(choice == kept[STEPS - TFINAL - 1] for choice in kept[STEPS - TFINAL :]), "the last choice stays"
    start, target = (9, 3) if off else (12, 4)
    chosen = lambda t: t > TINIT and (t % EVERY == 0 or t >= STEPS - TFINAL)  # noqa: E731
    assert counts == [budget(t, start, target) if chosen(t) else start for t in range(1, STEPS + 4)]


def test_largest_marks_exactly_as_many():
    scores = {"a": jnp.asarray([[3.0, 1.0], [0.0, 2.0]]), "b": jnp.asarray([2.5, 1.0])}
    marked = largest(scores, jnp.asarray(3))
    assert marked["a"].tolist() == [[True, False], [False, True]] and marked["b"].tolist() == [True, False]
    assert sum(int(jnp.sum(x)) for x in largest(tree.constant(scores, jnp.zeros(2)), 3).values()) == 3
    assert not any(np.any(x) for x in largest(scores, 0).values())


@pytest.mark.slow
def test_adalora_trains_to_its_budget_and_stores_no_state():
    case = tiny.case("adalora:rank=2,steps=6,tinit=1,tfinal=2,every=1,targets=attn/.", "decoder")
    state, frozen = case.start(tx=optax.adam(1e-2))
    step = jax.jit(case.stepper(optax.adam(1e-2)))
    for i in range(6):
        state, metrics = step(state, frozen, tiny.micro(tiny.batch(seed=i), 1))
        assert metrics["finite"] and metrics["penalty"] > 0
    variables = peft.realised(case.method, state.variables(frozen), case.sites)
    nodes = tree.paths(variables["peft"], is_leaf=peft.is_node)
    assert sum(int(jnp.sum(n.lam != 0)) for n in nodes.values()) == 2 * 2 * 4, "two layers of four kernels"
    assert all(n.state is None for n in nodes.values())
    assert peft.realised(case.method, variables, case.sites) == variables
    assert tree.count(variables["peft"]) == tree.count(case.variables, case.mask) + 2 * 4, "and their scales"


# -------------------------------------------------------------------------------------------------------------- EVA


def rows_of(seed: int, spread: float) -> np.ndarray:
    """Rows [20, in] whose variance falls by spread^2 from one direction to the next."""
    turn = np.linalg.qr(np.random.default_rng(round(100 * spread)).normal(size=(D_IN, D_IN)))[0]
    return np.random.default_rng(seed).normal(size=(20, D_IN)) * spread ** np.arange(D_IN) @ turn


def two_sites(variables: dict, batch: dict, rng) -> Loss:
    """Sites of two inputs, the first in two layers; the loss does not depend on the rows whose weight is 0."""
    total = 0.0
    for path, x in (("layers/q", batch["q"]), ("v", batch["v"])):
        node = functools.reduce(lambda t, k: t[k], [*path.split("/"), "eva"], variables["peft"])
        for i in range(2 if path == "layers/q" else 1):
            one = jax.tree.map(lambda g, i=i: g[i], node) if path == "layers/q" else node
            rows = one.input(x[i] if path == "layers/q" else x, rng)
            total += jnp.sum(jnp.sin(rows @ jnp.ones((D_IN, 2))) * batch["weight"][:, None])
    return Loss(total, jnp.float32(1), {})


@pytest.mark.slow
@pytest.mark.parametrize("rho", [1, 2])
def test_eva_starts_on_the_main_directions_of_the_inputs(rho):
    method = registry.parse(f"eva:rank=2,rho={rho},alpha=6,batches=3,targets=layers/q|v")
    variables = {"params": {}, "peft": peft.init(method, jax.random.key(0), {"layers/q": site(layers=2), "v": site()})}
    weight = (np.arange(20) < 14).astype(np.float32)
    inputs = {(i, s): rows_of(10 * i + s, spread) for i in range(3) for s, spread in enumerate((0.3, 0.95, 0.6))}
    batches = lambda i: {  # noqa: E731
        "q": jnp.asarray(np.stack([inputs[i, 0], inputs[i, 1]]), jnp.float32),
        "v": jnp.asarray(inputs[i, 2], jnp.float32),
        "weight": weight,
    }
    after = method.fit(jax.random.key(0), variables, two_sites, batches)["peft"]
    nodes = [*(jax.tree.map(lambda x, i=i: x[i], after["layers"]["q"]["eva"]) for i in range(2)), after["v"]["eva"]]
    shares, bases = [], []
    for s, node in enumerate(nodes):
        _, sigma, vt = np.linalg.svd(np.concatenate([inputs[i, s][:14] for i in range(3)]))
        shares.append((sigma**2 / np.sum(sigma**2))[: 2 * rho])
        bases.append(vt[: 2 * rho].T)
        assert node.a.shape == (D_IN, 2 * rho) and float(node.scale) == 3.0 and not np.any(node.b)
    least = np.sort(np.concatenate(shares))[-6]
    ranks = [int(np.sum(share >= least)) for share in shares]
    assert ranks == ([2, 2, 2] if rho == 1 else [1, 3, 2])
    for node, rank, basis in zip(nodes, ranks, bases, strict=True):
        signs = np.sign(np.sum(np.asarray(node.a) * basis, axis=0))
        close(node.a * signs, basis * (np.arange(2 * rho) < rank), 1e-4)
        slope = jax.grad(lambda n: jnp.sum(jnp.sin(dot(jnp.ones((3, D_IN)), n.weight(kernels(), None)))))(node)
        assert not np.any(slope.a) and not np.any(slope.b[rank:]) and np.all(np.any(slope.b[:rank] != 0, axis=1))


def test_eva_sees_the_rows_that_a_model_reads():
    """The first layer's inputs are normed embeddings. No last token predicts, no first one's query has a choice."""
    case = tiny.case("eva:rank=4,batches=2", "decoder")
    p = {k: np.asarray(x, np.float64) for k, x in tree.paths(case.variables["params"]).items()}
    for name, first in (("q", 1), ("v", 0)):
        rows = []
        for data in (tiny.batch(seed=0), tiny.batch(seed=1)):
            for tokens, mask in zip(data["tokens"], data["mask"], strict=True):
                rows.append(p["embed/tokens/embedding"][tokens[first : mask.sum() - 1]])
        scale = {"n/scale": p["layers/attn_norm/scale"][0]}
        _, _, vt = np.linalg.svd(norm(scale, "n", np.concatenate(rows), case.config.norm_eps))
        a = np.asarray(case.variables["peft"]["layers"]["attn"][name]["eva"].a[0], np.float64)
        close(a @ a.T, vt[:4].T @ vt[:4], 1e-4)


def test_the_probe_changes_nothing_and_squares_what_counts():
    x, weight = jnp.asarray(rows_of(0, 1.0), jnp.float32), (np.arange(20) % 3 > 0).astype(np.float32)
    loss = lambda x, gram: jnp.sum(jnp.cos(Probe(gram).input(x, None)) * weight[:, None])  # noqa: E731
    dx, gram = jax.grad(loss, argnums=(0, 1))(x, jnp.zeros((D_IN, D_IN)))
    close(dx, -np.sin(x) * weight[:, None])
    close(gram, np.asarray(x)[weight > 0].T @ np.asarray(x)[weight > 0], 1e-4)


# ------------------------------------------------------------------------------------------------------------- VeRA


def test_vera_shares_its_random_matrices():
    method = registry.parse("vera:rank=5,targets=q|v|w")
    sites = {"layers/q": site(layers=L), "v": site(4, 9), "w": site(8, 3), "k": site(50, 50)}
    added = peft.init(method, jax.random.key(0), sites)
    shared = added["reparam"]["vera"]
    assert shared.a.shape == (8, 5) and shared.b.shape == (5, 9)
    assert tiny.same(shared, peft.init(method, jax.random.key(1), sites)["reparam"]["vera"])
    other = peft.init(registry.parse("vera:rank=5,targets=q|v|w,seed=1"), jax.random.key(0), sites)
    assert not np.array_equal(other["reparam"]["vera"].a, shared.a)
    added = {"reparam": added["reparam"]} | tiny.noise({k: v for k, v in added.items() if k != "reparam"})
    for name in ("vera:rank=5,targets=q|v|w", "lora:rank=2,targets=k+vera:rank=5,targets=q|v|w"):
        realised = peft.realised(registry.parse(name), {"params": {}, "peft": keyed(added, name)}, sites)
        again = peft.realised(registry.parse(name), realised, sites)
        assert tiny.same(again, realised)
        key = "vera" if name.startswith("vera") else "1_vera"
        for path, d_in, d_out in (("v", 4, 9), ("w", 8, 3)):
            node, w = added[path]["vera"], jnp.zeros((d_in, d_out))
            bound = realised["peft"][path][key].bind(realised["shared"][path][key])
            update = np.asarray(shared.a)[:d_in] * np.asarray(node.d) @ (np.asarray(shared.b)[:, :d_out] * node.b)
            close(dense(bound.weight(w, None), jnp.float32), update)
        assert realised["shared"]["layers"]["q"][key].a.shape == (D_IN, 5), "no stack axis: all layers share it"


def keyed(added: dict, name: str) -> dict:
    """Under the keys that a chain gives."""
    if name.startswith("vera"):
        return added
    return {k: {"1_vera": v["vera"]} if "vera" in v else keyed(v, name) for k, v in added.items()}


def test_vera_draws_kaiming_uniform_and_starts_as_the_paper_does():
    added = peft.init(registry.parse("vera:rank=64"), jax.random.key(0), {"attn/q": site(300, 200)})
    for x, fan_in in ((added["reparam"]["vera"].a, 300), (added["reparam"]["vera"].b, 64)):
        limit = (6 / fan_in) ** 0.5
        assert limit * 0.99 < np.abs(x).max() <= limit and abs(np.std(x) / (2 / fan_in) ** 0.5 - 1) < 0.02
    node = added["attn"]["q"]["vera"]
    assert np.all(node.d == np.float32(0.1)) and not np.any(node.b)
