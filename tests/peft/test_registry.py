"""Specification strings: what they mean, and the one line that says why they don't."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.lora import Lora
from tests import tiny

MINE = "tests.peft.my_methods.half"


def sites(family: str = "encoder"):
    return tiny.case("linear_probe", family).sites


def added(spec: str, family: str = "encoder") -> dict:
    return tree.paths(peft.init(registry.parse(spec), jax.random.key(0), sites(family)))


def places(spec: str, family: str = "encoder") -> set[str]:
    """Paths of the nodes without `layers/`."""
    return {path.rpartition("/")[0].removeprefix("layers/") for path in added(spec, family)}


def test_names_are_the_files():
    names = registry.names()
    assert names == sorted(names)
    assert {
        "bitfit",
        "full",
        "houlsby",
        "ia3",
        "layernorm",
        "linear_probe",
        "lora",
        "pfeiffer",
        "prefix",
        "prompt",
    } < set(names)
    assert not {"method", "registry", "tree", "merge", "adapter", "compose", "chain"} & set(names)


def test_options_are_converted_by_their_annotations():
    leaves = added("lora:rank=3,alpha=6,targets=attn/q")
    assert leaves["layers/attn/q/lora/a"].shape == (2, 32, 3)
    np.testing.assert_array_equal(leaves["layers/attn/q/lora/scale"], [2.0, 2.0])
    assert places("houlsby:width=4,norms=false") == {"attn_residual/houlsby", "mlp_residual/houlsby"}
    for text, norms in (("true", True), ("1", True), ("False", False), ("0", False)):
        mask = peft.mask(registry.parse(f"houlsby:norms={text}"), {"params": tiny.params(tiny.ENCODER), "peft": {}} | (
            {"head": {"bias": jnp.zeros(1)}}
        ))  # fmt: skip
        assert mask["params"]["embed"]["norm"]["scale"] is norms
    assert registry.parse(f"{MINE}:stop=none").identity and not registry.parse(f"{MINE}:stop=4").identity


def test_patterns_may_hold_anything_a_regular_expression_does():
    assert places("lora:targets=attn/(q|v)") == {"attn/q/lora", "attn/v/lora"}
    assert places("lora:targets=attn/[qk],rank=2") == {"attn/q/lora", "attn/k/lora"}
    assert places(r"lora:targets=\w+/(q|down),rank=2") == {"attn/q/lora", "mlp/down/lora"}
    assert places("lora:targets=att.+/v") == {"attn/v/lora"}
    assert places("lora:targets=at{1,2}n/v,rank=2") == {"attn/v/lora"}
    assert places("lora:targets=(?:at+n)/(?:q+|v)") == {"attn/q/lora", "attn/v/lora"}
    assert places("lora:targets=attn/q+ia3:targets=attn/v") == {"attn/q/0_lora", "attn/v/1_ia3", "mlp/down/1_ia3"}
    assert places("lora:targets=q") == {"attn/q/lora"} and places("lora:targets=(q|pooler)") == {
        "attn/q/lora",
        "pooler/lora",
    }
    assert len(places("lora:targets=all")) == 6, "the layers' projections, not the pooler"
    assert len(places("lora:targets=all", "decoder")) == 7, "and not the output projection"


def test_a_name_matches_whole_names_of_the_path():
    matches = peft.matcher("attn/(q|v)")
    assert matches("layers/attn/q") and matches("attn/v")
    assert not matches("layers/attn/qq") and not matches("layers/cross_attn/q") and not matches("layers/attn/q/lora")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("lora", ["lora"]),
        ("lora+ia3", ["lora", "ia3"]),
        ("lora:targets=q+,rank=2+bitfit", ["lora:targets=q+,rank=2", "bitfit"]),
        ("lora:targets=(a+b|c)+prefix:length=3", ["lora:targets=(a+b|c)", "prefix:length=3"]),
        (f"lora+{MINE}:value=2", ["lora", f"{MINE}:value=2"]),
    ],
)
def test_split(spec, parts):
    assert registry.split(spec) == parts


def test_a_users_own_method_by_dotted_path():
    leaves = added(f"{MINE}:value=0.25,twice=true,targets=attn/k")
    assert list(leaves) == ["layers/attn/k/half/l"]
    np.testing.assert_array_equal(leaves["layers/attn/k/half/l"], np.full((2, 32), 0.5))
    assert places(f"lora+{MINE}") == {"attn/q/0_lora", "attn/v/0_lora", "attn/v/1_half"}


WRONG = {
    "": "names no method",
    "+": "unknown PEFT method",
    "lora+": "unknown PEFT method 'lora\\+'",
    "lorra": "Did you mean 'lora'",
    "tree": "unknown PEFT method 'tree'",
    "chain": "unknown PEFT method",
    "lora+perfix": "'perfix'. Did you mean 'prefix'",
    "bitfit+lora:rnak=2": "no option 'rnak'. Did you mean 'rank'",
    "lora:colour=red": "no option 'colour'. Valid: alpha, alpha_pattern, dropout, layers, rank, rank_pattern, targets",
    "lora:rank": "not of the form option=value",
    "lora:rank=four": "rank=four is not a int",
    "lora:rank=2.5": "rank=2.5 is not a int",
    "lora:alpha=big": "alpha=big is not a float",
    "houlsby:norms=maybe": "norms=maybe is not a bool",
    "lora:rank=none": "rank=none is not a int",
    "lora:rank=0": "rank=0 is out of range",
    "lora:rank=-3": "rank=-3 is out of range",
    "lora:alpha=0": "alpha",
    "lora:alpha=nan": "alpha=nan",
    "lora:alpha=inf": "alpha=inf",
    "houlsby:std=nan": "std=nan",
    "lora:dropout=1": "dropout=1.0 is out of range",
    "lora:dropout=nan": "dropout=nan",
    "lora:rank=2,rank=4": "rank is given twice",
    "houlsby:width=0": "width=0 is out of range",
    "houlsby:activation=gleu": "'gleu'. Did you mean 'gelu'",
    "prefix:length=0": "length=0 is out of range",
    "prefix:hidden=-1": "hidden=-1 is out of range",
    "ptuning_v2:length=0": "length=0 is out of range",
    "prompt:length=0": "length=0 is out of range",
    "prompt:start=vocabulary": "'vocabulary'. Did you mean 'vocab'",
    "no.such.module": "unknown PEFT method 'no.such.module'",
    "tests.peft.my_methods.nothing": "unknown PEFT method",
    "tests.peft.my_methods.helper": "unknown PEFT method",
    "os.path.join": "unknown PEFT method",
    ".lora": "unknown PEFT method",
    "lora.": "unknown PEFT method",
    "..": "unknown PEFT method",
    f"{MINE}:valeu=1": "no option 'valeu'. Did you mean 'value'",
    f"{MINE}:stop=x": "stop=x is not a int",
}  # fmt: skip


@pytest.mark.parametrize("spec", WRONG)
def test_a_wrong_specification_is_one_line(spec):
    with pytest.raises(FlagError, match=WRONG[spec].replace("(", "\\(")) as caught:
        registry.parse(spec)
    assert "\n" not in str(caught.value)


MISFITS = {
    "lora:rank=33": "rank=33 is above the smaller side of a kernel \\[32, 32\\]: at most 32",
    "lora:targets=attn/qery": "targets=attn/qery matches no linear site of this model. Did you mean 'attn/q'",
    "lora:targets=q_proj": "matches no linear site of this model. Valid: attn/k, attn/o",
    "lora:targets=attn/(q": "'attn/\\(q' is not a regular expression",
    "lora:targets=": "matches no linear site",
    "ia3:feedforward=mlp/dwon": "feedforward=mlp/dwon matches no linear site of this model. Did you mean 'mlp/down'",
    "ia3:targets=mlp/down": "mlp/down",
    "houlsby:targets=residual": "Did you mean 'mlp_residual'",
    "prefix:targets=kv2,hidden=0": "matches no attention site",
    "prefix:targets=kv2": "matches no attention site",
    "ptuning_v2:targets=q": "matches no attention site",
    "lora+lora:targets=x": "targets=x matches no linear site",
}


@pytest.mark.parametrize("spec", MISFITS)
def test_a_specification_that_does_not_fit_the_model_is_one_line(spec):
    with pytest.raises(FlagError, match=MISFITS[spec]) as caught:
        peft.init(registry.parse(spec), jax.random.key(0), sites())
    assert "\n" not in str(caught.value)


def test_a_wrong_import_inside_a_users_module_is_no_unknown_method(tmp_path, monkeypatch):
    (tmp_path / "broken_methods.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        registry.parse("broken_methods.mine")


def test_a_node_at_no_site_is_the_methods_bug():
    node = Lora(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones(()))
    for where in ("nowhere/lora", "layers/attn/kv/lora"):
        method = peft.Method(lambda rng, sites, where=where: tree.unflatten({where: node}))
        with pytest.raises(ValueError, match=where.rpartition("/")[0]):
            peft.init(method, jax.random.key(0), sites())
