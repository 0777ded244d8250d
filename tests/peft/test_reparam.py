"""Reparametrisations of a projection: formulas in plain NumPy, orthogonality, counts, and one layer of Hugging Face
PEFT with the same tensors (golden values from tests/golden/make_reparam_golden.py).
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError
from research.nn.dot import LowRank, dot
from research.nn.linear import Linear
from research.nn.param import dense
from research.nn.sites import Site
from research.peft import boft, fourierft, hira, hra, loha, lokr, miss, oft, registry, said, shira, tree
from research.peft import method as peft
from research.peft.merge import merge
from research.quant.int8 import quantise
from tests import tiny
from tests.peft.test_counts import count

GOLDEN = Path(__file__).parents[1] / "golden" / "reparam.npz"
D_IN, D_OUT = 24, 36
SITES = {"layers_0/attn/q": Site("linear", (D_IN, D_OUT), ("embed", "heads"), jnp.zeros(()))}
# One of each kind of node, on a kernel [24, 36].
SPECS = [
    "loha:rank=2",
    "loha:rank=6",
    "lokr:rank=2",
    "lokr:rank=1,factor=6,both=true",
    "krona:scale=2",
    "hira:rank=3",
    "miss:rank=7",
    "miss:rank=8,form=mini,columns=4",
    "miss:rank=6,form=bat",
    "shira:rank=2",
    "oft:block_size=8",
    "oft:block_size=6,share=true",
    "oft:block_size=8,neumann=5",
    "boft:block_size=4",
    "boft:block_size=2,factors=3",
    "hra:rank=4",
    "hra:rank=3,orthogonal=true",
    "fourierft:frequencies=30,scale=20",
    "said:dim=20,targets=attn/q",
]
ORTHOGONAL = [spec for spec in SPECS if spec.startswith(("oft", "boft", "hra"))]


@functools.cache
def golden() -> dict[str, jax.Array]:
    with np.load(GOLDEN) as file:
        return {key: jnp.asarray(x) for key, x in file.items()}


@functools.cache
def fresh(spec: str):
    """(node, what it shares)."""
    method = registry.parse(spec)
    added = peft.init(method, jax.random.key(0), SITES)
    variables = peft.realised(method, {"peft": added}, SITES)
    at = lambda name: variables.get(name, {}).get("layers_0", {}).get("attn", {}).get("q", {})  # noqa: E731
    name = spec.partition(":")[0]
    return at("peft")[name], at("shared").get(name)


def moved(spec: str):
    """A bound node at a random point."""
    node, shared = tiny.noise(fresh(spec), 0.2)
    return node if shared is None else node.bind(shared)


def apply(node, x=None, kernel=None, bias=None):
    """One `nn.Linear` with the node, on the golden input."""
    g = golden()
    params = {"kernel": g["kernel"] if kernel is None else kernel, "bias": g["bias"] if bias is None else bias}
    x = g["x"] if x is None else x
    return Linear(D_OUT, ("embed", "heads"), dtype=str(x.dtype)).apply({"params": params, "peft": {"n": node}}, x)


def kernel_of(node, w: np.ndarray) -> np.ndarray:
    """The kernel that acts, column by column, from the identity as input."""
    return np.asarray(apply(node, jnp.eye(D_IN), jnp.asarray(w), jnp.zeros(D_OUT)))


def turned(node) -> np.ndarray:
    """R of a node that turns its input."""
    return np.asarray(node.input(jnp.eye(D_IN), None))


# ------------------------------------------------------------------------------------------------- Hugging Face PEFT


def from_hf(name: str):
    """The node with the golden tensors of a case: transposes and reshapes, as the files' docstrings have it."""
    t = {k.partition("/")[2]: v for k, v in golden().items() if k.startswith(name + "/")}
    method = name.partition("_")[0]
    if method == "loha":
        a, b = (lambda i: t[f"hada_w{i}_b"].T), (lambda i: t[f"hada_w{i}_a"].T)
        return loha.Loha(a(1), b(1), a(2), b(2), jnp.float32(6 / 3))
    if method == "lokr":
        whole = [t[k].T if (k := f"lokr_w{i}") in t else None for i in (1, 2)]
        a, b = ([t[k].T if (k := f"lokr_w{i}_{p}") in t else None for i in (1, 2)] for p in "ba")
        scale = {"lokr": 4 / 2, "lokr_whole": 4 / 8, "lokr_both": 3 / 1}[name]
        return lokr.Lokr(whole[0], a[0], b[0], whole[1], a[1], b[1], jnp.float32(scale))
    if method == "hira":
        return hira.Hira(t["hira_A"].T, t["hira_B"].T, jnp.float32(1))
    if name == "miss_bat":
        return miss.Bat(t["miss_block"].swapaxes(-1, -2))
    if method == "miss":
        return miss.Miss(t["miss_block"], (D_IN, D_OUT))
    if method == "shira":
        out, into = t["indices"]
        return shira.Shira(t["shira_weight"], into * D_OUT + out)
    if method == "oft":
        q = t["oft_R.weight"]
        size = {28: 8, 15: 6}[q.shape[1]]
        return oft.Oft(-q, size) if name == "oft_exact" else oft.Oft(q, size, 5)
    if method == "boft":
        return boft.Boft(t["boft_R"], t["boft_s"][:, 0])
    if method == "hra":
        return hra.Hra(t["hra_u"], name == "hra_orthogonal")
    return fourierft.FourierFt(t["fourierft_spectrum"], t["indices"][::-1].astype(np.int32), jnp.float32(20))


@pytest.mark.parametrize("name", sorted({key.partition("/")[0] for key in np.load(GOLDEN).files if "/" in key}))
def test_a_layer_of_hugging_face_peft(name):
    y = golden()[f"{name}/y"]
    np.testing.assert_allclose(apply(from_hf(name)), y, atol=2e-5)
    assert np.abs(apply(from_hf(name), kernel=0 * golden()["kernel"]) - y).max() > 0.1


# ---------------------------------------------------------------------------------------------------------- formulas


def update(spec: str) -> tuple[object, np.ndarray]:
    """(node, what it adds to the kernel), in double precision where NumPy does the rest."""
    node, w = moved(spec), np.zeros((D_IN, D_OUT), np.float32)
    return node, kernel_of(node, w)


@pytest.mark.parametrize("spec", ["loha:rank=2", "loha:rank=6"])
def test_loha(spec):
    node, delta = update(spec)
    assert (isinstance(node.weight(golden()["kernel"], None), LowRank)) == (spec == "loha:rank=2")
    expected = node.scale * (node.a1 @ node.b1) * (node.a2 @ node.b2)
    np.testing.assert_allclose(delta, expected, atol=1e-5)
    assert fresh(spec)[0].scale == 8 / node.a1.shape[1]


def test_kronecker_products():
    node, delta = update("lokr:rank=2")
    assert node.w1.shape == (4, 6) and node.w2_a.shape == (6, 2) and node.w2_b.shape == (2, 6)
    np.testing.assert_allclose(delta, node.scale * np.kron(node.w1, node.w2_a @ node.w2_b), atol=1e-5)
    node, delta = update("lokr:rank=1,factor=6,both=true")
    assert node.w1_a.shape == (6, 1) and node.w1_b.shape == (1, 6) and node.w2_a.shape == (4, 1)
    np.testing.assert_allclose(delta, node.scale * np.kron(node.w1_a @ node.w1_b, node.w2_a @ node.w2_b), atol=1e-5)
    node, delta = update("krona:scale=2")
    assert node.a.shape == (6, 6) and node.b.shape == (4, 6)
    np.testing.assert_allclose(delta, node.scale * np.kron(node.a, node.b), atol=1e-5)
    assert np.linalg.matrix_rank(delta) == np.linalg.matrix_rank(node.a) * np.linalg.matrix_rank(node.b) == 24
    assert [lokr.split(n) for n in (1, 7, 192, 576, 768, 1536)] == [
        (1, 1), (1, 7), (12, 16), (24, 24), (24, 32), (32, 48)
    ]  # fmt: skip


def test_krona_beside_the_feed_forward():
    case = tiny.case("krona_res:scale=2", "encoder")
    node = jax.tree.map(lambda x: x[0], case.point["peft"]["layers"]["mlp_residual"]["krona_res"])
    x, y = np.random.default_rng(0).normal(size=(2, 2, 3, 32)).astype(np.float32)
    expected = y + node.scale * x @ np.kron(node.a, node.b) + node.c * x
    np.testing.assert_allclose(node.residual(x, x, y, lambda z: z, None), expected, atol=1e-5)
    assert node.a.shape == (8, 4) and registry.parse("krona_res:residual=0").identity


def test_hira_multiplies_the_kernel():
    node, w = moved("hira:rank=3"), golden()["kernel"]
    np.testing.assert_allclose(kernel_of(node, w), w * (1 + node.scale * node.a @ node.b), atol=1e-5)


def test_miss_repeats_one_matrix():
    node, delta = update("miss:rank=7")
    np.testing.assert_allclose(delta, node.m[np.arange(D_IN) % 7], atol=1e-6)
    node, delta = update("miss:rank=8,form=mini,columns=4")
    np.testing.assert_allclose(delta, np.tile(node.m, (3, 9)), atol=1e-6)
    node, w = moved("miss:rank=6,form=bat"), golden()["kernel"]
    expected = np.block(
        [[b + m @ b + m for b, m in zip(np.split(row, 6, 1), node.m, strict=True)] for row in np.split(w, 4)]
    )
    np.testing.assert_allclose(kernel_of(node, w), expected, atol=1e-5)


def test_shira_moves_chosen_entries_alone():
    node, delta = update("shira:rank=2")
    assert len(set(node.index.tolist())) == 2 * (D_IN + D_OUT) == np.count_nonzero(delta)
    np.testing.assert_array_equal(delta.ravel()[node.index], node.values)


def test_random_places_are_fixed_by_seed_site_and_layer():
    sites = tiny.case("lora", "decoder").sites
    one, two = (
        tree.paths(peft.init(registry.parse(spec), jax.random.key(i), sites))
        for i, spec in enumerate(("shira:rank=2", "shira:rank=2,seed=1"))
    )
    q, v = (one[f"layers/attn/{n}/shira/index"] for n in "qv")
    assert not np.array_equal(q[0], q[1]) and not np.array_equal(q, two["layers/attn/q/shira/index"])
    assert q.dtype == jnp.int32 and q.shape == (2, 128) and v.shape == (2, 96)
    # The same on every machine and with every version of NumPy: these were drawn once and for all.
    assert shira.places(0, "layers_0/attn/q", 1000, 5).tolist() == [87, 208, 549, 779, 979]
    unrolled = tiny.case("lora", "decoder", scan=False).sites
    again = tree.paths(peft.init(registry.parse("shira:rank=2"), jax.random.key(9), unrolled))
    np.testing.assert_array_equal(again["layers_1/attn/q/shira/index"], q[1])


def test_fourierft_is_the_inverse_transform():
    for spec, shape in (("fourierft:frequencies=30,scale=20", (D_IN, D_OUT)), (None, (7, 9)), (None, (8, 6))):
        node = moved(spec) if spec else None
        if node is None:  # every coefficient, self-mirrored ones too, of odd and even sides
            u, v = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
            c = np.random.default_rng(1).normal(size=u.size).astype(np.float32)
            node = fourierft.FourierFt(c, np.stack([u, v]).astype(np.int32), jnp.float32(1))
        spectrum = np.zeros(shape)
        spectrum[tuple(node.where)] = node.spectrum
        np.testing.assert_allclose(node.update(*shape), np.fft.ifft2(spectrum).real, atol=1e-6)
    node = moved("fourierft:frequencies=30,scale=20")
    i, j = np.meshgrid(np.arange(D_IN), np.arange(D_OUT), indexing="ij")
    waves = [
        c * np.cos(2 * np.pi * (u * i / D_IN + v * j / D_OUT))
        for c, (u, v) in zip(node.spectrum, node.where.T, strict=True)
    ]
    expected = golden()["kernel"] + node.scale * sum(waves) / (D_IN * D_OUT)
    np.testing.assert_allclose(kernel_of(node, golden()["kernel"]), expected, atol=1e-5)
    assert not registry.parse("fourierft").identity and registry.parse("fourierft:start=zeros").identity


def test_hadamard_and_fastfood():
    matrix = np.ones((1, 1))
    for _ in range(4):
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    np.testing.assert_allclose(said.hadamard(x), x @ matrix, atol=1e-5)

    words, size, d = jnp.array([1, 2], jnp.uint32), 864, 13
    matrix_of = jax.jit(lambda words, theta: jax.jacobian(lambda t: said.fastfood(words, t, size))(theta))
    p = matrix_of(words, jnp.zeros(d))
    assert p.shape == (size, d)
    whole = matrix_of(words, jnp.zeros(16))
    np.testing.assert_allclose(whole[:, :d], p, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), np.sqrt(16 / size), rtol=1e-5)
    gram = np.asarray(p.T @ p)  # a random subspace: its columns are unit vectors, nearly orthogonal
    np.testing.assert_allclose(np.diag(gram), 1, atol=0.25)
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 0.25
    blocks = whole.reshape(-1, 16, 16)
    assert np.abs(blocks[0] - blocks[1]).max() > 0.01, "each block has its own G and B"
    assert not np.array_equal(whole, matrix_of(words + 1, jnp.zeros(16)))


@pytest.mark.slow
def test_said_moves_all_kernels_by_one_vector():
    case = tiny.case("said:dim=40", "decoder")
    kernels = 2 * 7
    theta = case.variables["peft"]["reparam"]["said"].theta
    assert theta.shape == (40 - kernels,) and tree.count(case.variables, case.mask) == 40
    params = {k for k in tree.paths(case.variables["peft"])}
    assert not any("theta" in k for k in params if k.startswith("layers"))
    realised = peft.realised(case.method, case.point, case.sites)
    assert tiny.same(realised["peft"], case.point["peft"])
    assert tiny.same(peft.realised(case.method, realised, case.sites), realised)
    site = case.point["peft"]["layers"]["attn"]["q"]["said"]
    for layer in range(2):
        node = jax.tree.map(lambda x, i=layer: x[i], site).bind(case.point["peft"]["reparam"]["said"])
        w = case.variables["params"]["layers"]["attn"]["q"]["kernel"][layer]
        words = jnp.stack([jnp.uint32(0), node.stream])
        expected = w + node.scale * said.fastfood(words, node.theta, w.size).reshape(w.shape)
        np.testing.assert_allclose(dense(node.weight(w, None), jnp.float32), expected, atol=1e-6)
    streams = [
        x.stream
        for x in jax.tree.leaves(case.variables["peft"], is_leaf=lambda x: isinstance(x, said.Said))
        if isinstance(x, said.Said)
    ]
    assert len(np.unique(np.concatenate(streams))) == kernels


@pytest.mark.slow
def test_said_gradients_reach_the_vector_through_the_scan():
    case = tiny.case("said:dim=40,targets=attn/(q|v)", "encoder")
    data = tiny.batch()

    def loss(peft_tree):
        v = peft.realised(case.method, case.point | {"peft": peft_tree}, case.sites)
        v = {k: v[k] for k in ("params", "peft", "shared")}
        return jnp.sum(case.model.apply(v, data["tokens"], data["mask"]) ** 3)

    floats = jax.tree.map(lambda x: x.dtype == jnp.float32, case.point["peft"])
    trained, rest = tree.partition(case.point["peft"], floats)
    grads = jax.jit(jax.grad(lambda t: loss(tree.combine(t, rest))))(trained)
    leaves = tree.paths(grads)
    assert len(leaves) == 3 and all(np.abs(x).min() > 0 for x in leaves.values())
    theta = leaves["reparam/said/theta"]
    step = np.zeros(theta.shape, np.float32)
    step[3] = 1e-2
    at = lambda sign: jax.jit(loss)(  # noqa: E731
        tree.map_with_path(lambda k, x: x + sign * step if k == "reparam/said/theta" else x, case.point["peft"])
    )
    np.testing.assert_allclose((at(1) - at(-1)) / 2e-2, theta[3], rtol=2e-2)


# --------------------------------------------------------------------------------------------------------- rotations


@pytest.mark.parametrize("spec", ORTHOGONAL)
def test_rotations_are_orthogonal_and_keep_norms(spec):
    node, w = moved(spec), golden()["kernel"]
    if "neumann" in spec:
        node = node.replace(q=node.q / 20)
    r = turned(node)
    approximate = 1e-3 if "neumann" in spec else 2e-6
    np.testing.assert_allclose(r @ r.T, np.eye(D_IN), atol=approximate)
    assert np.abs(r - np.eye(D_IN)).max() > (0.02 if "neumann" in spec else 0.1)
    merged = np.asarray(node.fold_input(w))
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), np.linalg.norm(w, axis=0), rtol=approximate * 10)
    np.testing.assert_allclose(merged, r @ w, atol=1e-5)


def test_oft_is_cayleys_transform():
    node = moved("oft:block_size=8")
    expected = np.zeros((D_IN, D_IN))
    for k, q in enumerate(np.asarray(node.q, np.float64)):
        skew = np.zeros((8, 8))
        skew[np.triu_indices(8, 1)] = q
        skew -= skew.T
        at = slice(8 * k, 8 * k + 8)
        expected[at, at] = (np.eye(8) + skew) @ np.linalg.inv(np.eye(8) - skew)
    np.testing.assert_allclose(turned(node), expected, atol=2e-6)
    small = node.replace(q=node.q / 20)
    errors = [np.abs(turned(small.replace(neumann=n)) - turned(small)).max() for n in (4, 5, 6, 9)]
    assert errors == sorted(errors, reverse=True) and errors[1] < 1e-3 and errors[3] < 1e-6
    shared = turned(moved("oft:block_size=6,share=true"))
    np.testing.assert_array_equal(shared[:6, :6], shared[18:, 18:])


def test_boft_is_a_product_of_butterflies():
    node = moved("boft:block_size=2,factors=3")
    expected = np.eye(D_IN)
    for i, blocks in enumerate(np.asarray(node.r, np.float64)):
        apart = 2**i  # rows that meet in a block: single ones, half a block, lie this far apart in segments of 2^(i+1)
        factor = np.zeros((D_IN, D_IN))
        for j, block in enumerate(blocks):
            segment, place = divmod(j, apart)
            rows = segment * 2 * apart + place + np.array([0, apart])
            skew = (block - block.T) / 2
            factor[np.ix_(rows, rows)] = (np.eye(2) - skew) @ np.linalg.inv(np.eye(2) + skew)
        expected = factor @ expected
    np.testing.assert_allclose(turned(node), expected, atol=2e-6)
    scaled = kernel_of(node, golden()["kernel"])
    np.testing.assert_allclose(scaled, expected @ golden()["kernel"] * node.scale, atol=1e-5)
    assert np.count_nonzero(np.abs(expected[0]) > 1e-9) == 8, "three factors of 2 mix 8 inputs"


def test_hra_is_a_product_of_reflections():
    node, expected = moved("hra:rank=4"), np.eye(D_IN)
    for u in np.asarray(node.u, np.float64).T:
        expected = (np.eye(D_IN) - 2 * np.outer(u, u) / (u @ u)) @ expected
    np.testing.assert_allclose(turned(node), expected, atol=2e-6)
    node = moved("hra:rank=3,orthogonal=true")
    q, _ = np.linalg.qr(np.asarray(node.u, np.float64))
    np.testing.assert_allclose(turned(node), np.eye(D_IN) - 2 * q @ q.T, atol=2e-6)
    start, _ = fresh("hra:rank=4")
    np.testing.assert_allclose(turned(start), np.eye(D_IN), atol=1e-6)
    assert not np.array_equal(start.u[:, 0], start.u[:, 2])


def test_hra_penalises_what_is_not_orthogonal():
    method = registry.parse("hra:rank=4,penalty=0.5")
    node = moved("hra:rank=4")
    u = np.asarray(node.u) / np.linalg.norm(node.u, axis=0)
    put = lambda node: {"peft": {"layers_0": {"attn": {"q": {"hra": node}, "v": {"hra": node}}}}}  # noqa: E731
    expected = 2 * 0.5 * np.sum((u.T @ u - np.eye(4)) ** 2)
    assert method.penalty(put(node), None) == pytest.approx(expected, rel=1e-5)
    stacked = put(jax.tree.map(lambda x: jnp.stack([x, x]), node))
    assert method.penalty(stacked, None) == pytest.approx(2 * expected, rel=1e-5)
    flat = put(node.replace(u=jnp.eye(D_IN)[:, :4] * 3))
    assert method.penalty(flat, None) == pytest.approx(0, abs=1e-6) and registry.parse("hra").penalty is None


# ---------------------------------------------------------------------------------------- what all of them promise


@pytest.mark.parametrize("spec", SPECS)
def test_start_merge_and_other_kernels(spec):
    g, node = golden(), moved(spec)
    base = Linear(D_OUT, ("embed", "heads")).apply({"params": {"kernel": g["kernel"], "bias": g["bias"]}}, g["x"])
    start, shared = fresh(spec)
    start = apply(start if shared is None else start.bind(shared))
    if registry.parse(spec).identity:
        np.testing.assert_array_equal(start, base)
    elif spec == "hra:rank=4":
        np.testing.assert_allclose(start, base, atol=1e-6)
    y = apply(node)
    assert np.abs(y - base).max() > 1e-2
    merged = merge({"params": {"q": {"kernel": g["kernel"], "bias": g["bias"]}}, "peft": {"q": {"n": node}}})
    merged = merged["params"]["q"]
    np.testing.assert_allclose(g["x"] @ merged["kernel"] + merged["bias"], y, atol=1e-5)

    a, b = np.random.default_rng(3).normal(size=(2, D_IN, D_OUT)).astype(np.float32) * 0.1
    deferred = LowRank(g["kernel"], jnp.asarray(a[:, :2]), jnp.asarray(b[:2]))
    expected = apply(node, kernel=g["kernel"] + a[:, :2] @ b[:2])
    np.testing.assert_allclose(behind(node, deferred), expected, atol=1e-5)

    codes = quantise(g["kernel"])
    np.testing.assert_allclose(apply(node, kernel=codes), apply(node, kernel=codes.dequantise("float32")), atol=1e-5)
    half = apply(node, g["x"].astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), y, atol=0.15, rtol=0.05)


def behind(node, w) -> jax.Array:
    """The node's layer, where another node has made the kernel `w`."""
    x = node.input(golden()["x"], None)
    return node.output(x, dot(x, node.weight(w, None)) + golden()["bias"], None)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_and_a_node_for_each_row(spec):
    node = moved(spec)
    other = tiny.noise(node, 0.2, seed=5)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), node, other)
    x = np.stack([golden()["x"]] * 2)
    rows = jax.jit(jax.vmap(lambda n, x: apply(n, x)))(both, x)
    np.testing.assert_allclose(rows, np.stack([apply(node), apply(other)]), atol=1e-5)

    names = [*node.trained, *(["theta"] if spec.startswith("said") else [])]
    values = {name: getattr(node, name) for name in names}
    loss = lambda values: jnp.sum(jnp.sin(apply(node.replace(**values))))  # noqa: E731
    grads = jax.jit(jax.grad(loss))(values)
    step = tiny.noise(jax.tree.map(jnp.zeros_like, values), 1.0, seed=6)
    moved_loss = lambda t: loss(jax.tree.map(lambda x, s: x + t * s, values, step))  # noqa: E731
    numeric = (moved_loss(2e-3) - moved_loss(-2e-3)) / 4e-3
    along = sum(jnp.sum(g * s) for g, s in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True))
    np.testing.assert_allclose(along, numeric, rtol=3e-2, atol=5e-2)
    for name, grad in tree.paths(grads).items():
        assert np.abs(grad).max() > 0, name


COUNTS = [
    ("loha", 921_600),
    ("lokr", 47_040),
    ("hra", 276_480),
    ("miss", 1_474_560),
    ("shira", 1_843_200),
    ("hira", 1_843_200),
    ("oft", 535_680),
    ("oft:targets=all", 2_321_280),
    ("boft", 161_280),
    ("fourierft", 60_000),
    ("said", 1_000),
    ("said:dim=20000", 20_000),
    # 30 * (24*24 + 24*24 for q, 48... and [576, 192] as A [24, 12], B [24, 16] for v); the residual form 2 * 576 + 1
    ("krona", 30 * (24 * 24 + 24 * 24 + 24 * 12 + 24 * 16)),
    ("krona_res", 30 * (24 * 24 + 24 * 24 + 1)),
]


@pytest.mark.parametrize(("spec", "trained"), COUNTS)
def test_counts_on_smollm2(spec, trained):
    assert count("smollm2-135m", spec) == trained


def test_krona_on_t5_base_widths():
    """The paper's factors at 768: A [32, 24] and B [24, 32]."""
    assert count("bert-base", "krona") == 12 * 2 * 2 * 32 * 24


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("oft:block_size=7", "does not divide 24.* 6, 8"),
        ("oft:block_size=25", "does not divide 24.* 24"),
        ("oft:block_size=1", "least value is 2"),
        ("oft:neumann=3", "valid are 0, the exact inverse, and 4"),
        ("boft:block_size=5", "does not divide 24.* 4, 6"),
        ("boft:block_size=3,factors=2", "try 4"),
        ("boft:block_size=4,factors=3", "at most factors=2"),
        ("hra:rank=3", "try 4"),
        ("hra:rank=26", "at most 24"),
        ("hra:orthogonal=true,penalty=1", "leave it at 0"),
        ("loha:rank=25", "at most 24"),
        ("loha:alpha=0", "such as 16"),
        ("hira:rank=25", "at most 24"),
        ("hira:scale=0", "such as 1"),
        ("lokr:rank=0", "least value is 1"),
        ("lokr:alpha=0", "such as 16"),
        ("lokr:factor=5", "does not divide 24.* 4, 6"),
        ("lokr:factor=8", "does not divide 36.* 6, 9"),
        ("krona:factor=7", "does not divide 24.* 6, 8"),
        ("krona:scale=0", "such as 1"),
        ("krona_res:scale=0", "such as 1"),
        ("miss:rank=25", "at most 24"),
        ("miss:rank=8,form=bat", "does not divide 36.* 6, 9"),
        ("miss:rank=8,form=mini,columns=5", "does not divide 36.* 4, 6"),
        ("miss:form=mix", "Valid: bat, mini, miss"),
        ("miss:columns=2", "choose form=mini"),
        ("miss:dropout=1", "0 <= dropout < 1"),
        ("miss:form=bat,dropout=0.1", "leave it at 0"),
        ("shira:rank=15", "at most 14"),
        ("shira:seed=-1", "least value is 0"),
        ("fourierft:frequencies=865", "at most 864"),
        ("fourierft:frequencies=0", "least value is 1"),
        ("fourierft:scale=0", "such as 150"),
        ("fourierft:start=one", "normal, zeros"),
        ("said:dim=1", "least value is 2"),
        ("said:seed=-1", "valid are 0 to"),
        ("said:targets=attn/w", "matches no linear site"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(FlagError, match=message):
        peft.init(registry.parse(spec), jax.random.key(0), SITES)
