"""What every method promises, on an encoder and on a decoder.

A new file in research/peft is picked up without an edit here.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from research.errors import FlagError, ModelError
from research.models.stack import stack, unstack
from research.peft import adapter, registry, tree
from research.peft import method as peft
from research.peft.merge import merge
from tests import tiny

CHAIN = "lora:rank=2+prefix:length=3,hidden=8+"  # and bitfit, or what the decoder has in its place
OPTIONS = ["lora:targets=all", "lora:dropout=0.1", "prefix:hidden=0", "prompt:start=vocab", "lora+ia3"]
SPECS = {
    "encoder": [*registry.names(), CHAIN + "bitfit", *OPTIONS],
    "decoder": [*registry.names(), CHAIN + "layernorm", *OPTIONS],
}
CASES = [(spec, family) for family, specs in SPECS.items() for spec in specs]
CASES.remove(("bitfit", "decoder"))  # no biases: `test_bitfit_needs_biases`
MERGEABLE = {"bitfit", "full", "ia3", "layernorm", "linear_probe", "lora"}
UNMERGEABLE = {"houlsby", "pfeiffer", "prefix", "ptuning_v2", "prompt"}


def cases(slow: Callable[[str], bool]) -> pytest.MarkDecorator:
    """All cases, of which some are left out by `-m "not slow"`."""
    marks = {True: pytest.mark.slow, False: ()}
    return pytest.mark.parametrize(("spec", "family"), [pytest.param(*c, marks=marks[slow(c[0])]) for c in CASES])


every = cases(slow=OPTIONS.__contains__)


def names(spec: str) -> set[str]:
    return {part.partition(":")[0] for part in registry.split(spec)}


@functools.cache
def base_output(family: str) -> np.ndarray:
    return tiny.case("linear_probe", family).forward({"params": tiny.params(tiny.CONFIGS[family])})


@every
def test_identity_at_init(spec, family):
    case = tiny.case(spec, family)
    fresh, base = case.forward(case.variables), base_output(family)
    if case.method.identity:
        np.testing.assert_array_equal(fresh, base)
    else:
        assert np.abs(fresh - base).max() > 0
    if "houlsby" in names(spec):
        np.testing.assert_allclose(fresh, base, atol=1e-3)


def test_which_methods_start_as_the_base():
    starts = {spec: registry.parse(spec).identity for spec, _ in CASES}
    assert not any(starts[name] for name in UNMERGEABLE)
    assert all(starts[name] for name in ("full", "bitfit", "layernorm", "linear_probe", "lora", "ia3", "lora+ia3"))


@every
def test_merged_equals_unmerged_or_nothing_changes(spec, family):
    case = tiny.case(spec, family)
    before = jax.tree.map(np.array, case.point)
    try:
        merged = merge(case.point)
    except ModelError as error:
        assert "can't be merged" in str(error) and not names(spec) <= MERGEABLE
    else:
        assert not names(spec) & UNMERGEABLE and "peft" not in merged
        assert jax.tree.structure(merged["params"]) == jax.tree.structure(case.point["params"])
        np.testing.assert_allclose(case.forward(merged), case.forward(case.point), atol=1e-5)
        assert tiny.same(merge(merged), merged)
    assert tiny.same(jax.tree.map(np.array, case.point), before)


@every
def test_every_layer_of_every_added_leaf_changes_the_output(spec, family):
    case = tiny.case(spec, family)
    output = case.forward(case.point)
    leaves = tree.paths(case.point["peft"])
    for path, leaf in leaves.items():
        stacked = path.startswith("layers/")
        for layer in range(leaf.shape[0]) if stacked else [None]:
            step = np.random.default_rng(5).normal(size=leaf.shape[stacked:]) if leaf.dtype.kind == "f" else 1
            moved = leaf.at[layer].add(step) if stacked else leaf + np.asarray(step, leaf.dtype)
            put = lambda p, x, path=path, moved=moved: moved if p == path else x  # noqa: E731
            changed = case.forward(case.point | {"peft": tree.map_with_path(put, case.point["peft"])})
            assert np.abs(changed - output).max() > 1e-5, (path, layer)


@every
def test_padding_and_neighbours_change_nothing(spec, family):
    case = tiny.case(spec, family)
    data = tiny.batch(1, tiny.SHORT, seed=7)
    text, pads = data["tokens"][0].clip(1), tiny.LENGTH - tiny.SHORT
    alone = case.forward(case.point, {"tokens": text[None], "mask": np.ones_like(text)[None]})[0]
    rng = np.random.default_rng(8)
    tokens = rng.integers(1, tiny.VOCAB, (tiny.ROWS, tiny.LENGTH)).astype(np.int32)  # pads are no zeros either
    mask = np.ones_like(tokens)
    starts = {0: pads, 1: 0, 2: pads // 2}  # row: where the text starts
    for row, start in starts.items():
        mask[row] = 0
        tokens[row, start : start + tiny.SHORT], mask[row, start : start + tiny.SHORT] = text, 1
    padded = case.forward(case.point, {"tokens": tokens, "mask": mask})
    for row, start in starts.items():
        np.testing.assert_allclose(padded[row, start : start + tiny.SHORT], alone, atol=1e-5, err_msg=f"row {row}")
    assert np.abs(padded[3, : tiny.SHORT] - alone).max() > 1e-2, "another text gives another result"


@every
def test_save_and_load_under_any_name(spec, family, tmp_path):
    case = tiny.case(spec, family)
    base, point = {"name": "tiny", "fingerprint": "f" * 64}, case.point
    output = case.forward(peft.realised(case.method, point, case.sites))
    np.testing.assert_allclose(case.forward(point), output, atol=1e-5)
    for name in ("0", "self_attn", "lora", "default"):
        size = adapter.save(tmp_path / name, spec, point, case.sites, base, classes=["a", "b", "c"])
        loaded = adapter.load(tmp_path / name)
        assert loaded.meta["classes"] == ["a", "b", "c"] and loaded.meta["spec"] == spec
        assert loaded.meta["trainable"] == tree.count(point, case.mask)
        assert size == sum(f.stat().st_size for f in (tmp_path / name).iterdir())
        variables = adapter.attach(loaded, case.variables["params"], case.sites, base["fingerprint"])
        np.testing.assert_array_equal(case.forward(variables), output)
        assert ("head" in variables) == case.has_head
        if case.has_head:
            assert tiny.same(variables["head"], point["head"])


@every
def test_scanned_equals_unrolled(spec, family):
    case, unrolled = tiny.case(spec, family), tiny.case(spec, family, scan=False)
    added = unstack(case.point["peft"])
    assert tree.constant(added, 0) == tree.constant(unrolled.variables["peft"], 0)
    variables = {"params": unstack(case.point["params"]), "peft": added}
    np.testing.assert_allclose(unrolled.forward(variables), case.forward(case.point), atol=1e-5)
    assert tiny.same(stack(added), case.point["peft"])


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
    again = peft.init(case.method, jax.random.key(1), case.sites)
    other = peft.init(case.method, jax.random.key(2), case.sites)
    assert tiny.same(again, case.variables["peft"])
    assert not tiny.same(again, other)
    if spec == "lora":
        fewer = peft.init(registry.parse("lora:targets=attn/q"), jax.random.key(1), case.sites)
        assert tiny.same(fewer["layers"]["attn"]["q"], again["layers"]["attn"]["q"])
        assert not np.array_equal(again["layers"]["attn"]["q"]["lora"].a, again["layers"]["attn"]["v"]["lora"].a)
