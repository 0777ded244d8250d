"""What every method promises, on an encoder and on a decoder.

A new file in research/peft is picked up without an edit here.
"""

import functools
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError, ModelError
from research.models.stack import stack, unstack
from research.peft import adapter, registry, tree
from research.peft import method as peft
from research.peft.merge import merge
from tests import tiny

CHAIN = "lora:rank=2+prefix:length=3,hidden=8+"  # and bitfit, or what the decoder has in its place
OPTIONS = ["lora:targets=all", "lora:dropout=0.1", "lora:layers=1", "prefix:hidden=0", "prompt:start=vocab", "lora+ia3"]
METHODS = [registry.small(name) for name in registry.names()]
SPECS = {
    "encoder": [*METHODS, CHAIN + "bitfit", *OPTIONS],
    "decoder": [*METHODS, CHAIN + "layernorm", *OPTIONS],
}


def applies(spec: str, family: str) -> bool:
    """Whether the model has what the method trains: no biases in the decoder, no cross-attention in either."""
    try:
        _ = tiny.case(spec, family).mask
    except FlagError:
        return False
    return True


REFUSED = {("bitfit", "decoder"), ("cross_attention", "encoder"), ("cross_attention", "decoder")}
CASES = [(spec, family) for family, specs in SPECS.items() for spec in specs if (spec, family) not in REFUSED]


def core(spec: str) -> bool:
    """The few whose every test is a quick one: a node at each kind of site, and a chain."""
    return spec in ("lora", "prefix", "houlsby", "prompt") or spec.startswith(CHAIN)


def cases(
    slow: Callable[[str, str], bool], keep: Callable[[str, str], bool] = lambda spec, family: True
) -> pytest.MarkDecorator:
    """The cases to keep, of which some are left out by `-m "not slow"`."""
    marks = {True: pytest.mark.slow, False: ()}
    kept = [pytest.param(*c, marks=marks[slow(*c)]) for c in CASES if keep(*c)]
    return pytest.mark.parametrize(("spec", "family"), kept)


def first(spec: str, family: str) -> bool:
    """One model for every method, both for the core: for what depends on the method and hardly on the model."""
    return family == "encoder" or core(spec)


# Made of another file's nodes or of its own sibling's, which the quick tests have.
SIBLINGS = [
    "compacterpp", "eva", "krona_res", "lora_fa", "lora_plus", "lt_sft", "mam", "olora", "parallel", "pissa",
    "ptuning_v2", "rslora", "s4", "shira", "sparse_adapter", "spot",
]  # fmt: skip


def sibling(spec: str) -> bool:
    return spec.split(":")[0] in SIBLINGS


every = cases(
    slow=lambda spec, family: (
        spec in OPTIONS or sibling(spec) or (family == "decoder" and not spec.startswith(("lora", CHAIN)))
    )
)


@functools.cache
def base_output(family: str) -> np.ndarray:
    return tiny.case("linear_probe", family).forward({"params": tiny.params(tiny.CONFIGS[family])})


@pytest.mark.parametrize(("spec", "family"), sorted(REFUSED))
def test_what_is_refused(spec, family):
    assert not applies(spec, family)


@every
def test_identity_at_init(spec, family):
    case = tiny.case(spec, family)
    fresh, base = case.forward(case.variables), base_output(family)
    if case.method.identity:
        np.testing.assert_array_equal(fresh, base)
    else:
        assert np.abs(fresh - base).max() > 0


@every
def test_merged_equals_unmerged_or_nothing_changes(spec, family):
    case = tiny.case(spec, family)
    point = peft.realised(case.method, case.point, case.sites)
    before = jax.tree.map(np.array, point)
    try:
        merged = jax.jit(merge)(point)
    except ModelError as error:
        assert "can't be merged" in str(error)
    else:
        assert "peft" not in merged and jax.tree.structure(merged["params"]) == jax.tree.structure(point["params"])
        output = tiny.case("linear_probe", family).forward({"params": merged["params"]})
        np.testing.assert_allclose(output, case.forward(case.point), atol=2e-5)
        assert merge(merged) is merged or tiny.same(merge(merged), merged)
    assert tiny.same(jax.tree.map(np.array, point), before)


@every
def test_every_layer_of_every_added_leaf_changes_the_output(spec, family):
    case = tiny.case(spec, family)
    output = case.forward(case.point)
    nodes = tree.paths(case.point["peft"], is_leaf=peft.is_node)
    silent = {path for path, node in nodes.items() if node.derived}
    silent |= {f"{path}/{name}" for path, node in nodes.items() for name in node.inert}
    for path, leaf in tree.paths(case.point["peft"]).items():
        if any(path.startswith(f"{node}/") for node in silent):
            continue
        stacked = path.startswith("layers/")
        on = case.point_on(path)
        for layer in range(leaf.shape[0]) if stacked else [None]:
            moved = np.array(leaf)  # in NumPy: jax would compile for each shape
            old = moved[layer] if stacked else moved
            step = np.random.default_rng(5).normal(size=old.shape)
            new = ~old if leaf.dtype == bool else old + (step if jnp.issubdtype(leaf.dtype, jnp.floating) else 1)
            moved[layer if stacked else ...] = new
            put = lambda p, x, path=path, moved=moved: moved if p == path else x  # noqa: E731
            changed = case.forward(case.point | {"peft": tree.map_with_path(put, case.point["peft"])})
            assert (np.abs(changed - output).max() > 1e-5) == on(layer), (path, layer)


@every
def test_padding_and_neighbours_change_nothing(spec, family):
    case = tiny.case(spec, family)
    data = tiny.batch(1, tiny.SHORT, seed=7)
    text, pads = data["tokens"][0].clip(1), tiny.LENGTH - tiny.SHORT
    rng = np.random.default_rng(8)
    tokens = rng.integers(1, tiny.VOCAB, (tiny.ROWS, tiny.LENGTH)).astype(np.int32)  # pads are no zeros either
    mask = np.ones_like(tokens)
    starts = {0: pads, 1: 0, 2: pads // 2}  # row: where the text starts
    for row, start in starts.items():
        mask[row] = 0
        tokens[row, start : start + tiny.SHORT], mask[row, start : start + tiny.SHORT] = text, 1
    padded = case.forward(case.point, {"tokens": tokens, "mask": mask})
    if case.spec in ("lora", "prompt", "prefix"):  # another shape is another compilation
        alone = case.forward(case.point, {"tokens": text[None], "mask": np.ones_like(text)[None]})[0]
    else:
        alone = padded[0, pads:]
    for row, start in starts.items():
        np.testing.assert_allclose(padded[row, start : start + tiny.SHORT], alone, atol=1e-5, err_msg=f"row {row}")
    assert np.abs(padded[3, : tiny.SHORT] - alone).max() > 1e-2, "another text gives another result"
    tokens[3] = rng.integers(1, tiny.VOCAB, tiny.LENGTH)
    again = case.forward(case.point, {"tokens": tokens, "mask": mask})
    np.testing.assert_array_equal(again[:3][mask[:3] == 1], padded[:3][mask[:3] == 1])


@every
def test_save_and_load_under_any_name(spec, family, tmp_path):
    case = tiny.case(spec, family)
    base, point = {"name": "tiny", "fingerprint": "f" * 64}, case.point
    size = adapter.save(tmp_path / "0", spec, point, case.sites, base, classes=["a", "b", "c"])
    assert size == sum(f.stat().st_size for f in (tmp_path / "0").iterdir())
    for name in ("self_attn", "lora", "default"):
        shutil.copytree(tmp_path / "0", tmp_path / name)
        loaded = adapter.load(tmp_path / name)
        assert loaded.meta["classes"] == ["a", "b", "c"] and loaded.meta["spec"] == spec
        assert loaded.meta["trainable"] == tree.count(point, case.mask)
    variables = adapter.attach(loaded, case.variables["params"], case.sites, base["fingerprint"])
    realised = peft.realised(case.method, point, case.sites)
    np.testing.assert_array_equal(case.forward(variables), case.forward(realised))
    np.testing.assert_allclose(case.forward(variables), case.forward(point), atol=1e-5)
    assert ("head" in variables) == case.has_head
    if case.has_head:
        assert tiny.same(variables["head"], point["head"])


@cases(slow=lambda spec, family: not core(spec), keep=first)
def test_scanned_equals_unrolled(spec, family):
    case, other = tiny.case(spec, family), tiny.case(spec, family, scan=False)
    point, fresh = (adapter.own(x["peft"]) for x in (case.point, other.variables))
    added = unstack(point)
    assert tree.constant(added, 0) == tree.constant(fresh, 0)
    variables = {"params": unstack(case.point["params"]), "peft": added}
    np.testing.assert_allclose(other.forward(variables), case.forward(case.point), atol=1e-5)
    assert tiny.same(stack(added), point)


def test_bitfit_needs_biases():
    case = tiny.case("bitfit", "decoder")
    with pytest.raises(FlagError, match="has no biases"):
        peft.mask(case.method, {"params": tiny.params(case.config)})
    with pytest.raises(FlagError, match="none of the model's"):
        peft.mask(registry.parse("bitfit:targets=attn/w"), {"params": tiny.params(tiny.ENCODER)})


def test_linear_probe_needs_a_head():
    with pytest.raises(FlagError, match="trains nothing"):
        peft.mask(registry.parse("linear_probe"), {"params": tiny.params(tiny.ENCODER)})


@pytest.mark.parametrize("spec", ["lora", "prefix", "houlsby", "lora+ia3"])
def test_init_depends_on_the_key_and_the_path_alone(spec):
    case = tiny.case(spec, "encoder")
    init = jax.jit(functools.partial(peft.init, case.method, sites=case.sites))
    assert tiny.same(init(jax.random.key(1)), case.variables["peft"])
    assert not tiny.same(init(jax.random.key(2)), case.variables["peft"])
    if spec == "lora":
        fewer = peft.init(registry.parse("lora:targets=attn/q"), jax.random.key(1), case.sites)
        q, v = (case.variables["peft"]["layers"]["attn"][name] for name in "qv")
        tiny.close(fewer["layers"]["attn"]["q"], q, 1e-6)
        assert not np.array_equal(q["lora"].a, v["lora"].a)
