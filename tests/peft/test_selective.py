"""Methods that train part of the base: their choice against plain NumPy, exact counts, and that nothing else moves."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.shared import classification, training
from research.errors import FlagError
from research.models.registry import build
from research.models.stack import unstack
from research.nn.dot import dot, low_rank
from research.peft import adapter, compose, registry, tree
from research.peft import method as peft
from research.peft.diff_pruning import SHUT, Diff, prune
from research.peft.elements import changes, highest
from research.peft.far import best
from research.peft.fishmask import fisher
from research.quant.int8 import quantise
from research.quant.tree import quantise_tree
from research.tasks.loss import Loss
from tests import tiny
from tests.peft.test_counts import count

MASKED = ["last_layers", "trainable_tokens:rows=5|7|10-19", "fishmask:fraction=0.02,batches=2", "lt_sft:steps=3", "far"]
ELEMENTS = MASKED[2:4]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def trained(spec: str, params: dict) -> dict:
    """{path: mask} of the base's leaves that train in part or whole."""
    mask = tree.paths(registry.parse(spec).trainable({"params": params, "peft": {}})["params"])
    return {path: m for path, m in mask.items() if tree.trains(m)}


# ------------------------------------------------------------------------------------------------- by name and by row


def test_bitfits_partial_form_is_one_option():
    assert count("bert-base", "bitfit:targets=attn/q|mlp/up") == 12 * (768 + 3072) == 46_080
    assert count("bert-base", "bitfit:targets=attn/q|mlp/up|pooler") == 46_080 + 768
    names = trained("bitfit:targets=attn/q|mlp/up", tiny.params(tiny.ENCODER))
    assert set(names) == {"layers/attn/q/bias", "layers/mlp/up/bias"}


def test_the_last_layers_are_whole_layers():
    assert [count("bert-base", f"last_layers:count={n}") for n in (1, 3, 12)] == [7_087_872, 21_263_616, 85_054_464]
    assert count("smollm2-135m", "last_layers:count=2") == 2 * (2 * 576 * (576 + 192) + 3 * 576 * 1536 + 2 * 576)
    scanned = tiny.params(tiny.ENCODER)
    for path, m in trained("last_layers", scanned).items():
        leaf = tree.paths(scanned)[path]
        assert path.startswith("layers/") and m.shape == (2, *(1,) * (leaf.ndim - 1))
        assert m.ravel().tolist() == [False, True]
    unrolled = trained("last_layers", unstack(scanned))
    assert set(unrolled) == {p for p in tree.paths(unstack(scanned)) if p.startswith("layers_1/")}
    assert all(m is True for m in unrolled.values())
    many = {f"layers_{i}": {"attn": {"q": {"bias": jnp.zeros(1)}}} for i in range(12)}
    assert {p.split("/")[0] for p in trained("last_layers:count=2", many)} == {"layers_10", "layers_11"}, "not 9"


def test_cross_attention_is_found_by_its_name():
    attention = {name: {"kernel": jnp.ones((2, 4, 4))} for name in "qkvo"}
    decoder = {"attn": attention, "cross_attn": attention, "cross_attn_norm": {"scale": jnp.ones((2, 4))}}
    params = {"encoder": {"layers": {"attn": attention}}, "decoder": {"layers": decoder}}
    assert set(trained("cross_attention", params)) == {f"decoder/layers/cross_attn/{n}/kernel" for n in "qkvo"}
    for config in tiny.CONFIGS.values():
        with pytest.raises(FlagError, match="no cross-attention.*T5"):
            trained("cross_attention", tiny.params(config))


def test_token_rows_train():
    # 6,144 is also what Hugging Face PEFT's comparison counts for two tokens of this model.
    assert count("llama3.2-3b", "trainable_tokens:rows=128000|128001") == 6_144
    (mask,) = trained("trainable_tokens:rows=5|7|10-12|11", tiny.params(tiny.ENCODER)).values()
    assert mask.shape == (64, 1) and np.flatnonzero(mask).tolist() == [5, 7, 10, 11, 12]


def test_tied_rows_are_rows_of_the_output_too():
    case = tiny.case("linear_probe", "decoder", tie_embeddings=True)
    data = {"tokens": np.full((1, 4), 9, np.int32), "mask": np.ones((1, 4), np.int32)}
    base = tiny.params(case.config)
    table = base["embed"]["tokens"]["embedding"]
    moved = base | {"embed": {"tokens": {"embedding": table.at[5].add(1.0)}}}
    before, after = (case.forward({"params": p}, data) for p in (base, moved))
    assert np.flatnonzero(np.any(before != after, axis=(0, 1))).tolist() == [5]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("last_layers:count=0", "least value is 1"),
        ("last_layers:count=3", "at most 2"),
        ("trainable_tokens", "names no rows"),
        ("trainable_tokens:rows=9-5", "names no rows"),
        ("trainable_tokens:rows=1-2-3", "names no rows"),
        ("trainable_tokens:rows=x", "Valid: rows=5"),
        ("trainable_tokens:rows=1|64", "rows 0-63"),
        ("fishmask:fraction=0", "0 < fraction < 1"),
        ("fishmask:fraction=1", "--peft=full"),
        ("fishmask:batches=0", "least value is 1"),
        ("lt_sft:steps=0", "least value is 1"),
        ("lt_sft:learning_rate=0", "such as 5e-5"),
        ("far:fraction=1.5", "0 < fraction < 1"),
        ("far:targets=attn/q", "Valid: mlp/up"),
        ("far:targets=mlp/upp", "Did you mean"),
        ("diff_pruning:sparsity=-1", "least value is 0"),
        ("diff_pruning:ratio=0", "such as 100"),
        ("diff_pruning:start=-1", "such as 5"),
        ("diff_pruning:targets=mlp/w", "matches no linear site"),
    ],
)
def test_options_out_of_range_are_refused(spec, told):
    with pytest.raises(FlagError, match=told):
        method = registry.parse(spec)
        peft.init(method, jax.random.key(0), tiny.case("linear_probe", "encoder").sites)
        peft.mask(method, {"params": tiny.params(tiny.ENCODER), "peft": {}})


# ------------------------------------------------------------------------------------------------- the highest scores


def test_the_highest_scores_are_exactly_so_many_whatever_ties():
    rng = np.random.default_rng(0)
    scores = {"a": rng.integers(0, 4, (5, 7)).astype(np.float32), "b": {"c": rng.integers(0, 4, 9).astype(np.float32)}}
    flat = np.concatenate([scores["a"].ravel(), scores["b"]["c"]])
    order = np.argsort(-flat, kind="stable")
    for n in range(1, flat.size + 1):
        chosen = highest(scores, n)
        got = np.concatenate([chosen["a"].ravel(), chosen["b"]["c"]])
        assert np.flatnonzero(got).tolist() == sorted(order[:n]), "of equal ones the first"
    with pytest.raises(FlagError, match="not finite"):
        highest({"a": np.array([1.0, np.nan])}, 1)


@pytest.mark.slow
def test_the_highest_of_22_million():
    scores = np.random.default_rng(0).random(22_713_216, np.float32)  # MiniLM-L6
    scores[: len(scores) // 2] = 0.75
    chosen = highest({"a": scores}, 113_566)["a"]
    assert chosen.sum() == 113_566 and scores[chosen].min() > scores[~chosen].max()


def softmax_loss(variables: dict, batch: dict, rng) -> Loss:
    """Softmax regression: z = x W."""
    logp = jax.nn.log_softmax(batch["x"] @ variables["params"]["w"] + variables["head"]["b"])
    picked = jnp.take_along_axis(logp, batch["y"][:, None], 1)[:, 0]
    return Loss(-jnp.sum(picked * batch["weight"]), jnp.sum(batch["weight"]), {})


@functools.cache
def regression() -> tuple:
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    variables = {"params": {"w": jnp.asarray(draw(4, 3))}, "peft": {}, "head": {"b": jnp.asarray(draw(3))}}
    weights = np.array([1, 2, 0, 3, 1], np.float32)  # of which one row only pads the batch
    batches = [{"x": draw(5, 4), "y": rng.integers(0, 3, 5).astype(np.int32), "weight": weights} for _ in range(3)]
    return variables, batches


def slopes(w: np.ndarray, b: np.ndarray, batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """Each row's -d log p / d W [5, 4, 3] and / d b [5, 3]: x (p - y)'."""
    z = batch["x"] @ w + b
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    error = p - np.eye(3)[batch["y"]]
    return batch["x"][:, :, None] * error[:, None, :], error


def test_fisher_information():
    variables, batches = regression()
    w, b = (np.asarray(x, np.float64) for x in (variables["params"]["w"], variables["head"]["b"]))
    expected = sum((slopes(w, b, batch)[0] ** 2)[batch["weight"] > 0].sum(0) for batch in batches[:2])
    np.testing.assert_allclose(fisher(variables, softmax_loss, batches.__getitem__, 2)["w"], expected, rtol=1e-5)


def test_the_first_phase_is_adam_on_base_and_head():
    variables, batches = regression()
    w, b = (np.asarray(x, np.float64) for x in (variables["params"]["w"], variables["head"]["b"]))
    start, m, v = w, [0, 0], [0, 0]
    for i, batch in enumerate(batches):
        share = batch["weight"] / batch["weight"].sum()
        g = [np.tensordot(share, s, 1) for s in slopes(w, b, batch)]
        m = [0.9 * a + 0.1 * x for a, x in zip(m, g, strict=True)]
        v = [0.999 * a + 0.001 * x**2 for a, x in zip(v, g, strict=True)]
        hat = lambda a, beta, i=i: a / (1 - beta ** (i + 1))  # noqa: E731
        dw, db = (0.1 * (1 - i / 3) * hat(a, 0.9) / (np.sqrt(hat(c, 0.999)) + 1e-8) for a, c in zip(m, v, strict=True))
        w, b = w - dw, b - db
    moved = changes(jax.random.key(0), variables, softmax_loss, batches.__getitem__, 3, 0.1)
    np.testing.assert_allclose(moved["w"], np.abs(w - start), rtol=1e-4)
    np.testing.assert_array_equal(variables["params"]["w"], start.astype(np.float32))  # whose buffer is still there


def test_a_first_phase_that_diverges_is_told():
    variables, batches = regression()
    broken = lambda v, *more: softmax_loss(v, *more)._replace(sum=jnp.log(-1.0) * v["params"]["w"].sum())  # noqa: E731
    method = registry.parse("lt_sft:steps=1")
    with pytest.raises(FlagError, match="learning_rate"):
        method.fit(jax.random.key(0), variables, broken, batches.__getitem__)


@pytest.mark.parametrize("spec", ELEMENTS)
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_fraction_of_all_elements_is_chosen(spec, family):
    case = tiny.case(spec, family)
    size, fraction = tree.count(case.variables["params"]), 0.02 if "0.02" in spec else 0.01
    assert tree.count(case.variables["params"], case.mask["params"]) == round(fraction * size)
    node = case.variables["peft"]["reparam"][spec.split(":")[0]]
    assert tree.paths(node.chosen).keys() == tree.paths(case.variables["params"]).keys()
    assert peft.realised(case.method, case.variables, case.sites)["peft"] == {}


def test_fishmask_chooses_where_the_gradients_are():
    case = tiny.case(ELEMENTS[0], "encoder")
    total = jax.tree.map(lambda x: np.zeros(x.shape), case.variables["params"])

    def mean(params, row):
        found = case.plain_loss(case.variables | {"params": params, "peft": {}}, row, None)
        return found.sum / found.weight

    slope = jax.jit(jax.grad(mean))
    for seed in range(2):
        for i in range(tiny.ROWS):
            row = {k: x[i : i + 1] for k, x in tiny.batch(seed=seed).items()}
            total = jax.tree.map(
                lambda t, g: t + np.asarray(g, np.float64) ** 2, total, slope(case.variables["params"], row)
            )
    scores, chosen = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (total, case.mask["params"]))
    assert scores[chosen].min() >= scores[~chosen].max() * (1 - 1e-4)


@pytest.mark.slow
def test_an_unrolled_stack_chooses_the_same():
    scanned, unrolled = (tiny.case(ELEMENTS[0], "encoder", scan=scan).mask["params"] for scan in (True, False))
    pairs = zip(jax.tree.leaves(unstack(scanned)), jax.tree.leaves(unrolled), strict=True)
    assert sum(np.count_nonzero(np.asarray(a) != np.asarray(b)) for a, b in pairs) <= 2, "but for rounding"


def test_far_chooses_units_in_each_matrix_and_layer():
    moved = np.abs(np.random.default_rng(0).normal(size=(2, 6, 10))).astype(np.float32)
    for over, along in ((1, 2), (2, 1)):
        chosen, sums = best(moved, over, 0.3), moved.sum(over)
        units = round(0.3 * moved.shape[along])
        for layer in range(2):
            expected = np.sort(np.argsort(-sums[layer])[:units])
            assert np.flatnonzero(chosen[layer]).tolist() == expected.tolist()
    assert best(np.ones((1, 6, 10), np.float32), 1, 0.2).ravel().tolist() == [True] * 2 + [False] * 8, "ties"


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_far_trains_whole_units(family):
    case = tiny.case("far", family)
    mask = {path: m for path, m in tree.paths(case.mask["params"]).items() if tree.trains(m)}
    ways = ("up", "down", "gate") if family == "decoder" else ("up", "down")
    expected = {f"layers/mlp/{name}/kernel" for name in ways}
    assert set(mask) == expected | ({"layers/mlp/up/bias"} if family == "encoder" else set())
    for path, m in mask.items():
        assert m.shape == ((2, 56) if path.endswith("bias") else (2, 56, 1) if "down" in path else (2, 1, 56))
        assert m.reshape(2, 56).sum(1).tolist() == [6, 6], path
    if family == "encoder":
        np.testing.assert_array_equal(mask["layers/mlp/up/bias"], mask["layers/mlp/up/kernel"][:, 0])
    total = 2 * 6 * (32 * len(ways) + (family == "encoder"))
    assert tree.count(case.variables["params"], case.mask["params"]) == total


# ------------------------------------------------------------------------------------------------------- in training


@functools.cache
def three_steps(spec: str, family: str) -> tuple[dict, dict]:
    """The base before and after."""
    case = tiny.case(spec, family)
    state, frozen = case.start()
    for i in range(3):
        state, metrics = case.step(state, frozen, tiny.micro(tiny.batch(seed=i), 1))
        assert metrics["finite"]
    return case.variables, state.variables(frozen)


@pytest.mark.slow
@pytest.mark.parametrize("spec", MASKED)
def test_only_the_chosen_elements_move(spec):
    case = tiny.case(spec, "encoder")
    before, after = (tree.paths(v["params"]) for v in three_steps(spec, "encoder"))
    some = False
    for path, m in tree.paths(case.mask["params"]).items():
        moved = np.asarray(before[path]) != np.asarray(after[path])
        chosen = np.broadcast_to(m, moved.shape)
        assert not np.any(moved & ~chosen), path
        assert moved[chosen].mean() > 0.95 if chosen.any() else True, path
        some |= bool(np.ndim(m)) and bool(chosen.any()) and not chosen.all()
    assert some, "a leaf trains in part"


@pytest.mark.parametrize("spec", MASKED)
def test_an_adapter_holds_the_chosen_elements(spec, tmp_path):
    case, (before, after) = tiny.case(spec, "encoder"), three_steps(spec, "encoder")
    adapter.save(tmp_path / "a", spec, after, case.sites, {"name": "tiny", "fingerprint": "f"})
    leaves = {p: x for p, x in load_file(tmp_path / "a" / adapter.WEIGHTS).items() if not p.startswith("head/")}
    elements, stored = tree.count(before["params"], case.mask["params"]), sum(x.nbytes for x in leaves.values())
    numbers, shapes_ = 8 if spec in ELEMENTS else 4, sum(x.nbytes for p, x in leaves.items() if p.endswith("#mask"))
    assert stored - shapes_ <= numbers * elements * 1.05
    assert stored - shapes_ >= numbers * elements * 0.9, "a leaf of which most trains is stored whole"
    loaded = adapter.attach(adapter.load(tmp_path / "a"), before["params"], case.sites, "f")
    assert tree.paths(loaded["params"]).keys() == tree.paths(after["params"]).keys()
    np.testing.assert_array_equal(case.forward(loaded), case.forward(after))
    assert tiny.same(loaded["params"], after["params"])


@pytest.mark.parametrize("spec", ["last_layers", *ELEMENTS, "far"])
def test_a_quantised_base_is_refused(spec):
    case = tiny.case(spec, "encoder")
    variables = case.variables | {"params": quantise_tree(case.variables["params"])}
    with pytest.raises(FlagError, match="is quantised and can't train"):
        peft.mask(case.method, variables)
    if case.method.fit:
        with pytest.raises(FlagError, match="is quantised and can't train"):
            case.method.fit(jax.random.key(0), variables, case.plain_loss, lambda i: tiny.batch(seed=i))


@pytest.mark.parametrize("spec", [*ELEMENTS, "far"])
def test_before_fit_nothing_trains_and_of_shapes_all_may(spec):
    case = tiny.case(spec, "encoder")
    params, init = case.variables["params"], functools.partial(peft.init, case.method, jax.random.key(0), case.sites)
    with pytest.raises(FlagError, match="trains nothing"):
        peft.mask(case.method, {"params": params, "peft": init()})
    mask = tree.paths(peft.mask(case.method, {"params": params, "peft": jax.eval_shape(init)})["params"])
    fitted = tree.paths(case.mask["params"])
    assert all(tree.trains(mask[path]) for path, m in fitted.items() if tree.trains(m))
    assert spec != "far" or {p for p, m in mask.items() if tree.trains(m)} == {
        p for p, m in fitted.items() if tree.trains(m)
    }


def test_a_chain_may_not_train_an_element_twice():
    one, two = (tiny.case(spec, "encoder") for spec in ("far", "last_layers"))
    both = compose.chain(one.method, two.method)
    variables = one.variables | {"peft": {"reparam": {"0_far": one.variables["peft"]["reparam"]["far"]}}}
    with pytest.raises(FlagError, match="both train layers/mlp"):
        peft.mask(both, variables)
    beside = compose.chain(one.method, registry.parse("bitfit:targets=attn/q"))
    assert tree.count(variables, peft.mask(beside, variables)) == tree.count(one.variables, one.mask) + 64


def test_layers_restrict_the_chosen_elements():
    case = tiny.case("fishmask:fraction=0.02,batches=2,layers=1", "encoder")
    whole, some = (tree.paths(c.mask["params"]) for c in (tiny.case(ELEMENTS[0], "encoder"), case))
    for path, m in whole.items():
        if path.startswith("layers/"):
            np.testing.assert_array_equal(some[path][1], m[1])
        assert not np.any(some[path][0] if path.startswith("layers/") else some[path]), path
    with pytest.raises(FlagError, match="trains nothing"):
        peft.mask(registry.parse("trainable_tokens:rows=5,layers=1"), {"params": case.variables["params"], "peft": {}})


def test_a_chain_chooses_beside_what_it_adds(tmp_path):
    spec = "lora:rank=2+fishmask:fraction=0.02,batches=2"
    case = tiny.case(spec, "encoder")
    assert tree.count(case.variables["params"], case.mask["params"]) == round(0.02 * 22_352)
    assert set(case.variables["peft"]["reparam"]) == {"1_fishmask"}
    assert set(peft.realised(case.method, case.variables, case.sites)["peft"]) == {"layers"}
    adapter.save(tmp_path / "a", spec, case.point, case.sites, {"name": "tiny", "fingerprint": "f"})
    loaded = adapter.attach(adapter.load(tmp_path / "a"), case.variables["params"], case.sites, "f")
    np.testing.assert_array_equal(case.forward(loaded), case.forward(case.point))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["fishmask:fraction=0.02,batches=2", pytest.param("far:steps=2,learning_rate=1e-3", marks=pytest.mark.slow)]
)
def test_seeds_with_their_own_masks_share_a_program(spec):
    config = tiny.ENCODER
    base = SimpleNamespace(model=build(config), params=tiny.params(config), config=config, tokenizer=None)
    data = {k: v for k, v in tiny.batch(rows=24).items() if k != "weight"}
    recipe = classification.Recipe(1e-2, steps=3, batch_size=8, warmup=0, schedule="constant", weight_decay=0.5)
    run = classification.start(base, spec, tiny.CLASSES, data, recipe, [0, 1])
    batch = classification.batches(data, recipe, [0, 1])
    state, step = run.state, jax.jit(run.step)
    for i in range(3):
        state, metrics = step(state, run.frozen, batch(i))
    after = {path: np.asarray(x) for path, x in tree.paths(state.trainable["params"]).items()}
    masks = {path: np.asarray(m) for path, m in tree.paths(state.mask["params"]).items()}
    old = tree.paths(base.params)
    sizes, differ = [0, 0], False
    for path, new in after.items():
        differ |= not np.array_equal(*masks[path])
        for seed in range(2):
            moved, chosen = new[seed] != np.asarray(old[path]), np.broadcast_to(masks[path][seed], old[path].shape)
            assert not np.any(moved & ~chosen), (path, seed)
            sizes[seed] += chosen.sum()
    assert differ and sizes[0] == sizes[1] == training.counts(run)[0]
    assert training.counts(run)[1] == tree.count(base.params)
    alone = classification.start(base, spec, tiny.CLASSES, data, recipe, 1)
    one, single = alone.state, classification.batches(data, recipe, 1)
    for i in range(3):
        one, _ = jax.jit(alone.step)(one, alone.frozen, single(i))
    for path, x in tree.paths(one.trainable["params"]).items():
        np.testing.assert_allclose(after[path][1], x, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ diff pruning

D_IN, D_OUT = 6, 5


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def diff(structured: bool = False) -> Diff:
    gates = jnp.asarray(2 * draw(D_IN, D_OUT, seed=1))
    return Diff(jnp.asarray(draw(D_IN, D_OUT)), gates, jnp.float32(0.4) if structured else None)


def gates(log_alpha, noise=0.0) -> np.ndarray:
    return np.clip(sigmoid(np.asarray(log_alpha, np.float64) + noise) * 3 - 1.5, 0, 1)


@pytest.mark.parametrize("structured", [False, True])
def test_the_gated_change(structured):
    node, w = diff(structured), draw(D_IN, D_OUT, seed=2)
    z = gates(node.log_alpha) * (gates(node.group) if structured else 1)
    assert (z == 0).any() and (z > 0).any()
    np.testing.assert_allclose(node.weight(w, None), w + z * np.asarray(node.delta), atol=1e-6)
    key = jax.random.key(5)
    element, group = (
        np.asarray(jax.random.logistic(k, s)) for k, s in zip(jax.random.split(key), ((6, 5), ()), strict=True)
    )
    z = gates(node.log_alpha, element) * (gates(node.group, group) if structured else 1)
    np.testing.assert_allclose(node.weight(w, key), w + z * np.asarray(node.delta), atol=1e-6)


def test_gates_open_as_often_as_the_penalty_says():
    for log_alpha in (-1.0, 0.0, 2.0):
        node = Diff(jnp.ones((200, 200)), jnp.full((200, 200), log_alpha))
        z = np.asarray(node.change(jax.random.key(0)))
        assert abs((z > 0).mean() - sigmoid(log_alpha)) < 0.01


def test_a_fresh_one_is_the_kernel_to_the_bit():
    fresh = diff().replace(delta=jnp.zeros((D_IN, D_OUT)))
    w = draw(D_IN, D_OUT, seed=2)
    for rng in (None, jax.random.key(0)):
        assert np.asarray(fresh.weight(w, rng)).tobytes() == w.tobytes()


def test_after_other_nodes_and_on_codes():
    node, w, x = diff(), jnp.asarray(draw(D_IN, D_OUT, seed=2)), jnp.asarray(draw(7, D_IN))
    a, b = jnp.asarray(draw(D_IN, 2)), jnp.asarray(draw(2, D_OUT))
    alone = np.asarray(node.change())
    for before in (low_rank(w, a, b), low_rank(w, a, b, 0.5, jax.random.key(1))):
        np.testing.assert_allclose(dot(x, node.weight(before, None)), dot(x, before) + x @ alone, atol=1e-5)
    codes = quantise(w)
    np.testing.assert_allclose(node.weight(codes, None), codes.dequantise(jnp.float32) + alone, atol=1e-6)


def test_the_penalty_is_the_share_of_open_gates():
    case = tiny.case("diff_pruning:structured=true,sparsity=3", "encoder")
    nodes = tree.paths(case.point["peft"], is_leaf=peft.is_node).values()
    open_ = np.concatenate([sigmoid(x).ravel() for n in nodes for x in (n.log_alpha, n.group)])
    assert open_.size == 2 * (4 * 32 * 32 + 2 * 32 * 56) + 2 * 6
    np.testing.assert_allclose(case.method.penalty(case.point, jax.random.key(0)), 3 * open_.mean(), rtol=1e-5)


def test_gates_have_their_own_rate():
    case = tiny.case("diff_pruning:structured=true,ratio=7,targets=attn/q", "encoder")
    rates = tree.paths(case.method.rates(case.variables)["peft"])
    assert rates == {f"layers/attn/q/diff_pruning/{n}": r for n, r in (("delta", 1), ("log_alpha", 7), ("group", 7))}


def test_training_draws_gates_and_evaluation_does_not():
    case = tiny.case("diff_pruning:start=1", "encoder")
    loss, data = jax.jit(case.loss), tiny.batch()
    quiet = [loss(case.point, data, None).sum for _ in range(2)]
    noisy = [loss(case.point, data, jax.random.key(k)).sum for k in (0, 0, 1)]
    assert quiet[0] == quiet[1] and noisy[0] == noisy[1] != noisy[2] != quiet[0]


@pytest.mark.parametrize("structured", ["false", "true"])
def test_pruning_keeps_the_largest_changes(structured):
    case = tiny.case(f"diff_pruning:start=1,structured={structured}", "encoder")
    pruned = prune(case.point, 0.05)
    before, after = (tree.paths(v["peft"], is_leaf=peft.is_node) for v in (case.point, pruned))
    moved = {path: np.asarray(n.change()) for path, n in before.items()}
    size = sum(x.size for x in moved.values())
    least = np.sort(np.abs(np.concatenate([x.ravel() for x in moved.values()])))[-round(0.05 * size)]
    total = 0
    for path, n in after.items():
        kept = np.abs(moved[path]) >= least
        np.testing.assert_array_equal(n.change(), np.where(kept, moved[path], 0))
        np.testing.assert_array_equal(n.change(jax.random.key(1)), n.change())
        np.testing.assert_array_equal(n.log_alpha, np.where(kept, -SHUT, SHUT))
        total += np.count_nonzero(n.delta)
    assert total == round(0.05 * size)
    tiny.close(jax.tree.map(jnp.shape, pruned), jax.tree.map(jnp.shape, case.point))
    with pytest.raises(FlagError, match="no diff_pruning"):
        prune({"peft": {}}, 0.05)
    with pytest.raises(FlagError, match="out of range"):
        prune(case.point, 0)


def test_pruning_finds_its_nodes_in_a_chain():
    sites = tiny.case("linear_probe", "encoder").sites
    method = registry.parse("lora+diff_pruning:layers=1,targets=attn/q")
    added = peft.init(method, jax.random.key(0), sites)
    pruned = prune({"peft": added}, 0.5)["peft"]
    assert tiny.same(pruned["layers"]["attn"]["v"], added["layers"]["attn"]["v"])
    node = pruned["layers"]["attn"]["q"]["1_diff_pruning"]
    assert set(np.unique(node.node.log_alpha)) == {SHUT, -SHUT} and (node.node.log_alpha > 0).sum() == 1024
