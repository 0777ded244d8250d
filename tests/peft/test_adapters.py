"""Adapters in all their forms, hybrids, and methods that read every layer: each formula against plain NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError
from research.models.bert import BertConfig
from research.models.registry import build
from research.nn.on import On
from research.peft import adamix, houlsby, phm, registry, s4, tree, unipelt
from research.peft import method as peft
from research.peft.attention_fusion import Fusion
from research.peft.elements import highest
from research.peft.method import is_node
from research.peft.parallel import Parallel
from research.peft.prefix import Prefix
from research.tasks import classify
from research.tasks.loss import Loss, model_variables
from tests import tiny
from tests.peft.test_counts import count, shapes

D = 8
relu, sigmoid = lambda x: np.maximum(x, 0), lambda x: 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def filled(node, seed: int = 0):
    """The node with random numbers in every float leaf."""
    leaves, structure = jax.tree.flatten(node)
    floats = [draw(*x.shape, seed=seed + i) if x.dtype.kind == "f" else x for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, floats)


def sites(family: str = "encoder") -> dict:
    return peft.sites(build(tiny.CONFIGS[family]))


def added(spec: str, family: str = "encoder") -> dict:
    """{path: node} of a fresh method."""
    made = peft.init(registry.parse(spec), jax.random.key(0), sites(family))
    return tree.paths(made, is_leaf=is_node)


def residual(node, stream, x, y, norm=lambda h: h, rng=None) -> np.ndarray:
    return np.asarray(node.residual(stream, x, y, norm, rng))


def bottleneck(width: int = 3, after_norm: bool = False) -> houlsby.Bottleneck:
    leaves = draw(D, width), draw(width, seed=1), draw(width, D), draw(D, seed=2)
    return houlsby.Bottleneck(*leaves, activation="relu", after_norm=after_norm)


STREAM, X, Y = (draw(2, 4, D, seed=s) for s in (10, 11, 12))


# ---------------------------------------------------------------------------------------------- bottlenecks in parallel


def test_a_parallel_adapter_reads_what_the_sublayer_reads():
    b = bottleneck()
    expected = Y + 3 * (relu(X @ b.down + b.down_bias) @ b.up + b.up_bias)
    np.testing.assert_allclose(residual(Parallel(b, jnp.float32(3)), STREAM, X, Y), expected, atol=1e-5)


@pytest.mark.parametrize("learn", ["false", "true"])
def test_a_learnt_scale_trains_and_another_does_not(learn):
    nodes = added(f"parallel:learn_scale={learn},scale=1")
    mask = peft.trained_fields({"peft": tree.unflatten(nodes)})["peft"]
    trained = {path.rpartition("/")[2]: m for path, m in tree.paths(mask).items()}
    assert trained == dict.fromkeys(("down", "down_bias", "up", "up_bias"), True) | {"scale": learn == "true"}
    assert {float(n.scale[0]) for n in nodes.values()} == {1.0}


# --------------------------------------------------------------------------------------------------- Kronecker products


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_a_phm_product_is_one_with_the_sum_of_kronecker_products(rank):
    n, rows, columns = 3, 5, 4
    rule, x = draw(n, n, n), draw(2, 7, n * rows)
    b = draw(n, rows, columns) if rank is None else (draw(n, rows, rank), draw(n, rank, columns))
    dense = sum(np.kron(rule[i], b[i] if rank is None else b[0][i] @ b[1][i]) for i in range(n))
    np.testing.assert_allclose(phm.product(x, rule, b), x @ dense, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "rank", "forms"), [(512, 1, False), (1, None, False), (512, None, True)], ids=["low-rank", "one", "many"]
)
def test_the_sum_is_formed_only_where_that_is_cheaper(tokens, rank, forms):
    n, rows, columns = 4, 48, 6
    b = draw(n, rows, columns) if rank is None else (draw(n, rows, rank), draw(n, rank, columns))
    program = jax.make_jaxpr(phm.product)(draw(tokens, n * rows), draw(n, n, n), b)
    sizes = [math.prod(shape) for shape, _ in tiny.products(program.jaxpr)]
    assert (n * rows * n * columns in sizes) == forms


def phm_formula(y: np.ndarray, rule_down, down, down_bias, rule_up, up, up_bias) -> np.ndarray:
    dense = lambda rule, b: sum(np.kron(rule[i], b[i]) for i in range(len(rule)))  # noqa: E731
    return y + gelu(y @ dense(rule_down, down) + down_bias) @ dense(rule_up, up) + up_bias


@pytest.mark.slow
def test_phm_and_compacter_are_bottlenecks():
    n, m = 2, 4
    node = phm.Phm(
        draw(n, n, n), draw(n, D // n, m // n), draw(m), draw(n, n, n, seed=1), draw(n, m // n, D // n), draw(D)
    )
    np.testing.assert_allclose(residual(node, STREAM, X, Y), phm_formula(Y, *jax.tree.leaves(node)), atol=1e-4)
    own = filled(jax.tree.map(lambda x: x[0], added("compacter:reduction=2,rank=2")["layers/mlp_residual/compacter"]))
    rule, y = draw(4, 4, 4), draw(2, 4, 32)
    bound = own.bind(added("compacter")["reparam/compacter"].replace(rule=rule))
    expected = phm_formula(
        y, rule, own.down_left @ own.down_right, own.down_bias, rule, own.up_left @ own.up_right, own.up_bias
    )
    np.testing.assert_allclose(residual(bound, y, y, y), expected, rtol=1e-4, atol=1e-3)


def test_compacter_shares_one_rule():
    method, here = registry.parse("compacter"), sites()
    variables = {"params": {}, "peft": peft.init(method, jax.random.key(0), here)}
    rule = variables["peft"]["reparam"]["compacter"].rule
    once = peft.realised(method, variables, here)
    assert set(tree.paths(once["shared"])) == {f"layers/{s}_residual/compacter/rule" for s in ("attn", "mlp")}
    assert all(np.array_equal(x, rule) for x in tree.paths(once["shared"]).values())
    assert tiny.same(once["peft"], variables["peft"]), "the rule is saved with the rest"
    assert tiny.same(peft.realised(method, once, here), once)
    assert set(added("compacterpp")) == {"layers/mlp_residual/compacter", "reparam/compacter"}


# --------------------------------------------------------------------------------------------------------------- AdaMix


def mixture() -> adamix.Mixture:
    return adamix.Mixture(draw(3, D, 4), draw(3, 4), draw(2, 4, D), draw(2, D))


def test_adamix_averages_in_evaluation_and_draws_in_training():
    node = mixture()
    one = lambda w, b, v, c: Y + gelu(Y @ w + b) @ v + c  # noqa: E731
    means = (x.mean(axis=0) for x in (node.down, node.down_bias, node.up, node.up_bias))
    np.testing.assert_allclose(residual(node, STREAM, X, Y), one(*means), atol=1e-5)
    choices = {
        (i, j): one(node.down[i], node.down_bias[i], node.up[j], node.up_bias[j]) for i in range(3) for j in range(2)
    }
    drawn = []
    for seed in range(40):
        found = residual(node, STREAM, X, Y, rng=jax.random.key(seed))
        drawn += [pair for pair, expected in choices.items() if np.allclose(found, expected, atol=1e-5)]
    assert len(drawn) == 40 and set(drawn) == set(choices)


def noisy(variables, batch, rng) -> Loss:
    """Logits that move by `variables` times a random number of the pass."""
    move = 0.0 if rng is None else variables * jax.random.normal(rng, batch.shape)
    z, weight = batch + move, jnp.array([1.0, 3.0])
    return Loss(jnp.sum(z[:, 0] * weight), weight.sum(), {"first": (z[0, 0], jnp.ones(()))}, (z, weight))


def test_adamix_asks_two_passes_to_agree():
    task, batch, rng = registry.parse("adamix:consistency=0.5").task, draw(2, 3), jax.random.key(1)
    agreeing, apart = task(noisy)(0.0, batch, rng), task(noisy)(1.0, batch, rng)
    assert agreeing.sum == noisy(0.0, batch, rng).sum and agreeing.metrics["disagreement"][0] == 0
    one, two = (noisy(1.0, batch, key) for key in jax.random.split(rng))
    p, q = (np.exp(z.outputs[0]) / np.exp(z.outputs[0]).sum(axis=1, keepdims=True) for z in (one, two))
    kl = 0.5 * ((p - q) * np.log(p / q)).sum(axis=1)
    np.testing.assert_allclose(apart.sum, (one.sum + two.sum) / 2 + 0.5 * (kl * [1, 3]).sum(), rtol=1e-5)
    np.testing.assert_allclose(apart.metrics["disagreement"], ((kl * [1, 3]).sum(), 4), rtol=1e-5)
    np.testing.assert_allclose(apart.metrics["first"][0], (one.metrics["first"][0] + two.metrics["first"][0]) / 2)
    assert kl.min() > 1e-2 and apart.weight == one.weight
    assert tiny.same(task(noisy)(1.0, batch, None), noisy(1.0, batch, None)), "in evaluation the plain loss"
    with pytest.raises(ValueError, match="no `outputs`"):
        task(lambda *args: noisy(*args)._replace(outputs=None))(1.0, batch, rng)
    assert registry.parse("adamix:consistency=0").task is None


def test_disagreement_pulls_each_pass_to_the_other():
    """d KL(q | p) / dz = p - q, with q held."""
    z, other = draw(2, 3), draw(2, 3, seed=1)
    slope = jax.grad(lambda z: adamix.disagreement(z, jnp.asarray(other)).sum())(z)
    np.testing.assert_allclose(slope, 0.5 * (jax.nn.softmax(z) - jax.nn.softmax(other)), atol=1e-6)


@pytest.mark.slow
def test_adamix_trains_through_its_task():
    case = tiny.case("adamix", "encoder")
    task = case.method.task(classify.loss(case.model))
    loss = jax.jit(jax.value_and_grad(lambda v, rng: task(v, tiny.batch(), rng).sum))
    (one, slope), (two, _) = (loss(case.point, jax.random.key(seed)) for seed in (0, 1))
    assert one != two
    node = slope["peft"]["layers"]["mlp_residual"]["adamix"]
    reached = np.abs(node.down).max(axis=(2, 3)) > 0  # [L, M]
    assert np.all((reached.sum(axis=1) >= 1) & (reached.sum(axis=1) <= 2)), "an expert for each of two passes"


# -------------------------------------------------------------------------------------------------------- SparseAdapter


def pruned(how: str, sparsity: float = 0.4) -> tuple:
    """(the case, the variables before, after `fit`)."""
    case = tiny.Case.__new__(tiny.Case)
    spec = f"sparse_adapter:width=5,how={how},sparsity={sparsity},batches=2"
    case.method, case.loss = registry.parse(spec), tiny.case("linear_probe", "encoder").loss
    base = tiny.case("linear_probe", "encoder").variables
    before = base | {"peft": peft.init(case.method, jax.random.key(1), sites())}
    after = case.method.fit(jax.random.key(3), before, case.loss, lambda i: tiny.batch(seed=i))
    return case, before, after


@functools.cache
def snip() -> tuple:
    return pruned("snip")


def weights(variables: dict) -> dict[str, tuple]:
    """{name: (weights, what is kept)} of every adapter."""
    nodes = tree.paths(variables["peft"], is_leaf=is_node)
    pairs = {"down": lambda n: (n.adapter.down, n.down_kept), "up": lambda n: (n.adapter.up, n.up_kept)}
    return {f"{path}/{k}": tuple(map(np.asarray, of(n))) for path, n in nodes.items() for k, of in pairs.items()}


def split(scores: dict, after: dict) -> tuple[np.ndarray, np.ndarray]:
    """The scores of what is kept, and of what is pruned."""
    kept = {path: on for path, (_, on) in weights(after).items()}
    return tuple(np.concatenate([s[kept[path] == on] for path, s in scores.items()]) for on in (True, False))


@pytest.mark.slow
def test_snip_keeps_the_weights_whose_loss_would_move_most():
    case, before, after = snip()
    outs = lambda v: [case.loss(v, tiny.batch(seed=i), None) for i in range(2)]  # noqa: E731
    slope = jax.jit(jax.grad(lambda v: sum(o.sum / o.weight for o in outs(v)), allow_int=True))(before)
    slopes = {path: w for path, (w, _) in weights(slope).items()}
    on, off = split({path: np.abs(w * slopes[path]) for path, (w, _) in weights(before).items()}, after)
    assert on.min() >= off.max() * (1 - 1e-4) > 0 and len(on) == round(0.6 * (len(on) + len(off)))
    for path, (w, kept) in weights(after).items():
        np.testing.assert_array_equal(w, np.where(kept, weights(before)[path][0], 0))


@pytest.mark.parametrize(("how", "sparsity"), [("magnitude", 0.75), ("random", 0.5)])
def test_pruning_without_data(how, sparsity):
    _, before, after = pruned(how, sparsity)
    on, off = split({path: np.abs(w) for path, (w, _) in weights(before).items()}, after)
    assert len(on) == round((1 - sparsity) * (len(on) + len(off)))
    assert (on.min() >= off.max()) == (how == "magnitude")


def test_what_is_pruned_neither_counts_nor_trains():
    case, _, after = snip()
    mask = peft.mask(case.method, after)
    dense = 2 * 2 * 2 * 32 * 5  # sites, layers, halves
    biases = 2 * 2 * (5 + 32)
    assert tree.count(after["peft"], mask["peft"]) == round(0.6 * dense) + biases
    shapes_only = jax.eval_shape(lambda: after)
    assert tree.count(shapes_only["peft"], peft.mask(case.method, shapes_only)["peft"]) == dense + biases
    node = after["peft"]["layers"]["mlp_residual"]["sparse_adapter"]
    node = jax.tree.map(lambda x: x[0], node)
    moved = node.replace(adapter=node.adapter.replace(down=node.adapter.down + ~node.down_kept))
    y = draw(1, 3, 32)
    np.testing.assert_array_equal(residual(moved, y, y, y), residual(node, y, y, y))


def test_exactly_a_share_is_kept_even_of_equal_scores():
    kept = highest({"a": jnp.zeros((2, 3)), "b": jnp.ones(4)}, 5)
    assert kept["b"].all() and int(kept["a"].sum()) == 1


# ----------------------------------------------------------------------------------------- methods that read all layers


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def side_network(node, x, layers, embedded, mask) -> np.ndarray:
    """The ladder of one row: x, embedded [T, D], layers [L, T, D], mask [T, T]."""
    h = embedded @ node.first + node.first_bias
    for i, state in enumerate(layers):
        mu = sigmoid(node.gate[i] / node.temperature)
        h = mu * h + (1 - mu) * (state @ node.down[i] + node.down_bias[i])
        n = rms(h) * node.attn_norm[i]
        q, k, v = (np.split(n @ w[i], node.heads, axis=1) for w in (node.q, node.k, node.v))
        heads = []
        for q_, k_, v_ in zip(q, k, v, strict=True):
            scores = np.where(mask, q_ @ k_.T / np.sqrt(q_.shape[1]), -np.inf)
            probs = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(probs / probs.sum(1, keepdims=True) @ v_)
        h = h + np.concatenate(heads, axis=1) @ node.o[i]
        h = h + gelu(rms(h) * node.mlp_norm[i] @ node.wi[i]) @ node.wo[i]
    return x + rms(h) * node.norm @ node.up + node.up_bias


def test_the_ladder_is_a_small_transformer_beside_the_base():
    node = filled(added("ladder:heads=2")["outputs/ladder"])
    node = node.replace(temperature=np.float32(0.7))
    x, layers, embedded = draw(2, 5, 32), draw(2, 2, 5, 32), draw(2, 5, 32, seed=1)
    mask = np.tril(np.ones((5, 5), bool)) & (np.arange(5) < [[5], [3]])[:, None]
    found, _ = node.outputs_after(*(jnp.asarray(a) for a in (x, layers, embedded, mask)), None, {})
    for row in range(2):
        expected = side_network(node, x[row], layers[:, row], embedded[row], mask[row])
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-3)


def test_attention_fusion_attends_over_layers():
    layers, query = draw(3, 2, 5, D), draw(D)
    scores = layers @ query / np.sqrt(D)
    share = np.exp(scores) / np.exp(scores).sum(axis=0)
    found = Fusion(query).outputs(jnp.asarray(layers[-1] + 1), jnp.asarray(layers), None, None, None)
    np.testing.assert_allclose(found, (share[..., None] * layers).sum(axis=0) + 1, atol=1e-5)


WIDE = BertConfig(256, 128, 2, 4, 512, max_positions=96, dropout=0.0, attention_dropout=0.0, scan=False)


def programs(spec: str) -> list[jax.stages.Traced]:
    """The loss and its gradient in what a method adds, from shapes; unrolled, since XLA counts a scan's body once."""
    model, method = build(WIDE), registry.parse(spec)
    added = jax.eval_shape(lambda: peft.init(method, jax.random.key(0), peft.sites(model)))
    head = jax.eval_shape(lambda: classify.init_head(jax.random.key(0), WIDE.hidden_size, 3))
    data = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tiny.batch(4, 48)))
    trained, rest = tree.partition(added, peft.trained_fields({"params": {}, "peft": added})["peft"])

    def loss(trained: dict, rest: dict, fixed: dict, data: dict) -> jax.Array:
        return classify.loss(model)(fixed | {"peft": tree.combine(trained, rest)}, data, None).sum

    fixed = {"params": peft.base(model)[0], "head": head}
    return [jax.jit(fn).trace(trained, rest, fixed, data) for fn in (loss, jax.grad(loss))]


@pytest.mark.parametrize(("spec", "backward"), [("lora", True), ("ladder", False), ("attention_fusion", False)])
def test_nothing_is_differentiated_through_the_base_under_a_ladder(spec, backward):
    """Two products a layer meet the 512 units of the base's feed-forward; LoRA's gradient has two more, and costs as
    much again as the loss. A ladder's costs but its own.
    """
    through = [sum(512 in (*shape, n) for shape, n in tiny.products(p.jaxpr.jaxpr)) for p in programs(spec)]
    assert through == [4, 8 if backward else 4]
    forward, gradient = (p.lower().compile().cost_analysis()["flops"] for p in programs(spec))
    assert gradient > 1.8 * forward if backward else gradient < 1.1 * forward, (forward, gradient)


@pytest.mark.parametrize("spec", ["ladder", "attention_fusion", "unipelt", "compacter", "adamix"])
def test_a_decoder_stays_causal(spec):
    case = tiny.case(spec, "decoder")
    variables = model_variables(peft.realised(case.method, case.point, case.sites))
    logits = jax.jit(lambda tokens: case.model.apply(variables, tokens, jnp.ones_like(tokens), method="logits"))

    tokens = jnp.asarray(np.random.default_rng(0).integers(1, tiny.VOCAB, (1, 8)))
    one, two = logits(tokens), logits(tokens.at[0, 5].set(tokens[0, 5] % (tiny.VOCAB - 1) + 1))
    np.testing.assert_array_equal(one[0, :5], two[0, :5])
    assert np.abs(one[0, 5:] - two[0, 5:]).max() > 1e-3


# -------------------------------------------------------------------------------------------------------------- hybrids


def test_unipelt_gates_each_part():
    w, c, x = draw(D), np.float32(0.3), X.reshape(-1, D)
    g = sigmoid(x @ w + c)
    a, b, y = draw(D, 2), draw(2, 6), draw(len(x), 6)
    low = unipelt.GatedLora(a, b, jnp.float32(2), w, c).output(jnp.asarray(x), jnp.asarray(y), None)
    np.testing.assert_allclose(low, y + g[:, None] * 2 * (x @ a @ b), atol=1e-4)
    norm = lambda h: 2 * h + 1  # noqa: E731
    adapter, h = bottleneck(after_norm=True), norm(STREAM + Y)
    expected = Y + sigmoid(h @ w + c)[..., None] * (
        relu(h @ adapter.down + adapter.down_bias) @ adapter.up + adapter.up_bias
    )
    np.testing.assert_allclose(
        residual(unipelt.GatedAdapter(adapter, w, c), STREAM, X, Y, norm), expected, rtol=1e-4, atol=1e-3
    )
    virtual = unipelt.GatedPrefix(Prefix(draw(3, 2, 4), draw(3, 2, 4)), w, c).keys_values(jnp.asarray(X), None)
    np.testing.assert_allclose(virtual.gate, g.reshape(X.shape[:2]), atol=1e-6)
    assert virtual.on.all() and np.array_equal(virtual.k, draw(3, 2, 4))


@pytest.mark.parametrize("hidden", [0, 6])
def test_unipelt_hands_its_prefix_to_the_gates(hidden):
    method, here = registry.parse(f"unipelt:hidden={hidden},length=3"), sites()
    variables = {"params": {}, "peft": peft.init(method, jax.random.key(0), here)}
    done = peft.realised(method, variables, here)
    node = done["peft"]["layers"]["attn"]["kv"]["unipelt"]
    assert set(done["peft"]["layers"]["attn"]["kv"]) == {"unipelt"} and "reparam" not in done["peft"]
    assert node.prefix.k.shape == (2, 3, 4, 8) and np.std(node.prefix.k) > 0
    assert tiny.same(peft.realised(method, done, here), done)
    frozen = [p for p, m in tree.paths(peft.trained_fields(done)["peft"]).items() if not m]
    assert sorted(p.rpartition("/")[2] for p in frozen) == ["by", "scale", "scale"]


def test_mam_is_a_chain():
    nodes = added("mam:length=3,hidden=0,width=5")
    kinds = {path.rpartition("/")[2]: type(node).__name__ for path, node in nodes.items()}
    assert kinds == {"0_prefix": "Shift", "1_parallel": "Parallel"} | {"0_prefix": kinds["0_prefix"]}
    assert tiny.same(tree.unflatten(nodes), tree.unflatten(added("prefix:length=3,hidden=0+parallel:width=5")))


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (2, "23"),
        (3, "234"),
        (4, "1234"),
        (6, "122334"),
        (12, "112222333344"),
        (24, "1" * 4 + "2" * 8 + "3" * 8 + "4" * 4),
    ],
)
def test_the_groups_of_s4_form_a_spindle(depth, expected):
    assert "".join(map(str, s4.groups(depth))) == expected


def test_s4_gives_each_group_its_own_methods():
    base, here = shapes("bert-base")
    method = registry.parse("s4")
    variables = {"params": base, "peft": jax.eval_shape(lambda: peft.init(method, jax.random.key(0), here))}
    nodes = {k: n for k, n in tree.paths(variables["peft"], is_leaf=is_node).items() if isinstance(n, On)}
    layers = {path.rpartition("_")[2]: node.layers for path, node in nodes.items()}
    assert layers == {"houlsby": tuple(range(10)), "prefix": tuple(range(2, 12)), "lora": (0, 1, 10, 11)}
    mask = tree.paths(peft.mask(method, variables)["params"])
    trained = {path: np.ravel(m) for path, m in mask.items() if tree.trains(m)}
    assert trained and all(path.startswith("layers/") and path.endswith("/bias") for path in trained)
    assert all(np.flatnonzero(on).tolist() == list(range(6, 12)) for on in trained.values())


# --------------------------------------------------------------------------------------------------------------- counts

E_, L_ = 768, 12  # of bert-base
NORMS = 25 * 2 * E_
KRON = 2 * 64 + 2 * E_ * 24 // 4 + 24 + E_  # two rules, two B of [4, 192, 6], two biases
RANK_ONE = 2 * (E_ + 24) + 24 + E_
SIDE = 96


@pytest.mark.parametrize(
    ("name", "spec", "trained"),
    [
        ("bert-base", "parallel", L_ * (2 * E_ * 64 + 64 + E_)),
        ("bert-base", "parallel:learn_scale=true,width=512", L_ * (2 * E_ * 512 + 512 + E_ + 1)),
        ("bert-base", "phm", 2 * L_ * KRON + NORMS),
        ("bert-base", "compacter", 2 * L_ * RANK_ONE + 64 + NORMS),
        ("bert-base", "compacter:norms=false", 2 * L_ * RANK_ONE + 64),
        ("bert-base", "compacterpp:norms=false,rank=2", L_ * (4 * (E_ + 24) + 24 + E_) + 64),
        # A width that n does not divide is rounded up: 576 / 32 = 18 becomes 20.
        ("smollm2-135m", "compacterpp:norms=false", 30 * (2 * (576 + 20) + 20 + 576) + 64),
        ("bert-base", "adamix", L_ * (4 * (E_ * 16 + 16) + 16 * E_ + E_)),
        ("bert-base", "adamix:share_down=true,share_up=false", L_ * (E_ * 16 + 16 + 4 * (16 * E_ + E_))),
        (
            "bert-base",
            "ladder",
            (L_ + 1) * (E_ * SIDE + SIDE) + L_ * (12 * SIDE**2 + 2 * SIDE + 1) + SIDE + SIDE * E_ + E_,
        ),
        ("bert-base", "attention_fusion", E_),
        # AdapterHub's count of the same model, 8.892 % of 124,645,632
        ("roberta-base-pooler", "unipelt", 11_083_376),
        ("roberta-base", "unipelt:hidden=0", L_ * (10 * 2 * E_ + (2 * E_ * 48 + 48 + E_) + 4 * E_ * 8 + 4 * (E_ + 1))),
        ("bert-base", "mam:hidden=0", L_ * (30 * 2 * E_ + 2 * E_ * 512 + 512 + E_)),
        ("bert-base", "s4", 10 * 2 * (2 * E_ * 8 + 8 + E_) + 10 * 16 * 2 * E_ + 4 * 4 * E_ * 8 + 6 * (7 * E_ + 3072)),
    ],
)
def test_counts(name, spec, trained):
    assert count(name, spec) == trained


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parallel:scale=0", "switch the adapter off"),
        ("parallel:width=0", "least value is 1"),
        ("parallel:activation=gelo", "Did you mean 'gelu'"),
        ("phm:division=5", "does not divide 32. Valid: 2, 4, 8"),
        ("phm:std=0", "above 0, such as 0.01"),
        ("compacter:rank=0", "least value is 1"),
        ("compacter:rank=2", "at most 1"),
        ("compacter:reduction=0", "least value is 1"),
        ("adamix:experts=1", "least value is 2"),
        ("adamix:share_down=true", "nothing to mix"),
        ("adamix:consistency=-1", "least value is 0"),
        ("sparse_adapter:sparsity=1", "0 < sparsity < 1"),
        ("sparse_adapter:how=snap", "Did you mean 'snip'"),
        ("sparse_adapter:batches=0", "least value is 1"),
        ("ladder:reduction=3", "does not divide 32. Valid: 1, 2, 4"),
        ("ladder:heads=3", "does not divide 4. Valid: 1, 2, 4"),
        ("ladder:temperature=0", "above 0, such as 0.1"),
        ("unipelt:rank=33", "at most 32"),
        ("mam:length=0", "least value is 1"),
        ("s4:width=0", "least value is 1"),
        ("adamix:targets=ffn", "matches no residual site"),
    ],
)
def test_bad_options_name_a_valid_neighbour(spec, message):
    with pytest.raises(FlagError) as error:
        added(spec)
    assert message in str(error.value)
