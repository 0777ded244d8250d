"""Adapter directories that are damaged, or of another base, model or head."""

import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.errors import FlagError, ModelError
from research.peft import adapter, registry, tree
from research.peft import method as peft
from tests import tiny

BASE = {"name": "tiny", "fingerprint": "f" * 64}
SPEC = "lora:rank=2+bitfit"


def write(directory, spec=SPEC, **changes):
    case = tiny.case(spec, "encoder", **changes)
    adapter.save(directory, spec, case.point, case.sites, BASE)
    return case


def attached(directory, case, fingerprint=BASE["fingerprint"], **options):
    return adapter.attach(adapter.load(directory), case.variables["params"], case.sites, fingerprint, **options)


def fails(directory, case, match, **options):
    """Loading or attaching is one line of ModelError."""
    with pytest.raises(ModelError, match=match) as caught:
        attached(directory, case, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("error") < 3


def edit(directory, change):
    """Another weights file, rightly described."""
    leaves = load_file(directory / adapter.WEIGHTS)
    save_file(change(leaves), directory / adapter.WEIGHTS)
    describe(directory, sha256=hashlib.sha256((directory / adapter.WEIGHTS).read_bytes()).hexdigest())


def describe(directory, **changes):
    meta = json.loads((directory / adapter.META).read_text())
    (directory / adapter.META).write_text(json.dumps({k: v for k, v in (meta | changes).items() if v is not ...}))


def test_files_and_keys(tmp_path):
    """Golden names: an adapter written today must load tomorrow."""
    case = write(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"], "nothing half-written is left beside it"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]
    meta = json.loads((tmp_path / "a" / "adapter.json").read_text())
    sha256 = hashlib.sha256((tmp_path / "a" / "adapter.safetensors").read_bytes()).hexdigest()
    trainable = tree.count(case.point, case.mask)
    assert meta == {"format": 1, "spec": SPEC, "base": BASE, "trainable": trainable, "sha256": sha256}
    leaves = load_file(tmp_path / "a" / "adapter.safetensors")
    biases = [path for path in tree.paths(case.point["params"]) if path.endswith("/bias")]
    expected = {f"peft/layers/attn/{site}/0_lora/{leaf}" for site in "qv" for leaf in ("a", "b", "scale")}
    assert set(leaves) == expected | {f"params/{path}" for path in biases} | {"head/kernel", "head/bias"}


def test_saved_bytes_are_about_what_trains(tmp_path):
    case = tiny.case("full", "encoder")
    size = adapter.save(tmp_path / "full", "full", case.point, case.sites, BASE)
    assert size < 1.05 * tree.nbytes({k: case.point[k] for k in ("params", "head")}) + 4096
    assert write(tmp_path / "small", "ia3") and os.path.getsize(tmp_path / "small" / adapter.WEIGHTS) < 4096


def test_what_the_specification_rebuilds_is_not_stored(tmp_path):
    case = tiny.case("lora", "encoder")
    adapter.save(tmp_path / "a", "lora", case.variables, case.sites, BASE)
    assert not any(path.endswith("scale") for path in load_file(tmp_path / "a" / adapter.WEIGHTS))
    assert tiny.same(attached(tmp_path / "a", case)["peft"], case.variables["peft"])


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_of_a_leaf_that_trains_in_part_only_that_part_is_stored(tmp_path, family):
    spec = "lora:layers=1+layernorm:layers=0"
    case = tiny.case(spec, family)
    adapter.save(tmp_path / "a", spec, case.point, case.sites, BASE)
    leaves = load_file(tmp_path / "a" / adapter.WEIGHTS)
    rows = leaves["peft/layers/attn/q/0_lora/node/a#values"]
    np.testing.assert_array_equal(rows.reshape(32, 8), case.point["peft"]["layers"]["attn"]["q"]["0_lora"].node.a[1])
    variables = adapter.attach(adapter.load(tmp_path / "a"), case.variables["params"], case.sites, BASE["fingerprint"])
    np.testing.assert_array_equal(case.forward(variables), case.forward(case.point))


def test_parts_that_do_not_fit(tmp_path):
    case, path, key = write(tmp_path / "a", "lora:layers=1"), tmp_path / "a", "peft/layers/attn/q/lora/node/a"
    edit(path, lambda x: x | {f"{key}#index": np.array([2], np.int32)})
    fails(path, case, f"does not fit this model: {key}: values")
    edit(path, lambda x: x | {f"{key}#mask": np.array([3, 1, 1], np.int32)})
    fails(path, case, f"{key}: a mask")
    edit(path, lambda x: {k: v for k, v in x.items() if k != f"{key}#values"})
    fails(path, case, f"{key}")
    edit(path, lambda x: {k.replace("attn/q", "attn/w"): v for k, v in x.items()})
    fails(path, case, "1 unexpected: peft/layers/attn/w")


def test_a_prefix_mlp_is_dropped(tmp_path):
    case = write(tmp_path / "p", "prefix:length=3,hidden=8")
    leaves = load_file(tmp_path / "p" / adapter.WEIGHTS)
    added = {k for k in leaves if k.startswith("peft/")}
    assert added == {"peft/layers/attn/kv/prefix/k", "peft/layers/attn/kv/prefix/v"}
    variables = attached(tmp_path / "p", case)
    np.testing.assert_allclose(case.forward(variables), case.forward(case.point), atol=1e-5)
    trained = tree.partition(variables, peft.mask(case.method, variables))[0]
    assert set(tree.paths(trained["peft"])) == {k.removeprefix("peft/") for k in added if not k.endswith("by")}


@pytest.mark.parametrize("layers", [2, 11])
def test_a_prefix_is_the_same_scanned_and_unrolled(layers):
    """layers_10 comes after layers_9; from shapes and the MLP alone, no model runs."""
    from research.models.stack import unstack

    cases = [tiny.case("prefix:length=3,hidden=8", "decoder", num_layers=layers, scan=scan) for scan in (True, False)]
    added = {"params": {}, "peft": cases[0].variables["peft"]}
    scanned, unrolled = (peft.realised(case.method, added, case.sites)["peft"] for case in cases)
    tiny.close(unstack(scanned), unrolled, 1e-6)


def test_bf16_leaves_survive(tmp_path):
    config = {"param_dtype": "bfloat16", "dtype": "bfloat16"}
    case = write(tmp_path / "half", "bitfit", **config)
    variables = attached(tmp_path / "half", case)
    assert tiny.same(variables["params"], case.point["params"])
    assert variables["params"]["layers"]["attn"]["q"]["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("cut", [0, 4, 40, 400, -1])
def test_a_truncated_file(tmp_path, cut):
    case, file = write(tmp_path / "a"), tmp_path / "a" / adapter.WEIGHTS
    file.write_bytes(file.read_bytes()[:cut])
    fails(tmp_path / "a", case, "is damaged")


@pytest.mark.parametrize("at", [0, 7, 8, 9, 60, -1, -400])
def test_flipped_bytes(tmp_path, at):
    case, file = write(tmp_path / "a"), tmp_path / "a" / adapter.WEIGHTS
    data = bytearray(file.read_bytes())
    data[at] ^= 0xFF
    file.write_bytes(data)
    fails(tmp_path / "a", case, "is damaged")


def test_missing_files(tmp_path):
    case = write(tmp_path / "a")
    (tmp_path / "a" / adapter.WEIGHTS).unlink()
    fails(tmp_path / "a", case, "is damaged.*adapter.safetensors")
    fails(tmp_path / "nowhere", case, "no such directory")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", case, "is empty")
    (tmp_path / "empty" / "weights.bin").touch()
    fails(tmp_path / "empty", case, "no adapter.json.*weights.bin")
    (tmp_path / "file").touch()
    fails(tmp_path / "file", case, "is no adapter")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\xff\xfe"])
def test_broken_metadata(tmp_path, text):
    case = write(tmp_path / "a")
    (tmp_path / "a" / adapter.META).write_bytes(text.encode("latin-1"))
    fails(tmp_path / "a", case, "damaged|format|can't be rebuilt")


def test_metadata_of_another_time(tmp_path):
    case = write(tmp_path / "a")
    describe(tmp_path / "a", format=2)
    fails(tmp_path / "a", case, "format 2; this version reads 1")
    describe(tmp_path / "a", format=1, spec="lorra")
    fails(tmp_path / "a", case, "Did you mean 'lora'")
    describe(tmp_path / "a", spec=["lora"])
    fails(tmp_path / "a", case, "no valid 'spec'")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"spec": ...}, "spec"),
        ({"spec": 8}, "spec"),
        ({"sha256": ...}, "sha256"),
        ({"base": ...}, "base.name"),
        ({"base": "tiny"}, "base.name"),
        ({"base": {"name": None, "fingerprint": "f"}}, "base.name"),
        ({"base": {"name": "tiny", "fingerprint": ["f"]}}, "base.fingerprint"),
        ({"task": "classify"}, "classes"),
        ({"task": "classify", "classes": "ab", "max_length": 8}, "classes"),
        ({"task": "classify", "classes": ["a", 1], "max_length": 8}, "classes"),
        ({"task": "classify", "classes": [], "max_length": 8}, "classes"),
        ({"task": "classify", "classes": ["a", "b"], "max_length": True}, "max_length"),
        ({"task": "classify", "classes": ["a", "b"], "max_length": 8.0}, "max_length"),
        ({"task": "classify", "classes": ["a", "b"], "max_length": 0}, "max_length"),
    ],
)
def test_metadata_of_the_wrong_type_is_named(tmp_path, changes, key):
    case = write(tmp_path / "a")
    describe(tmp_path / "a", **changes)
    fails(tmp_path / "a", case, f"damaged: adapter.json has no valid '{key}'")


def test_a_head_that_is_expected(tmp_path):
    case, path = write(tmp_path / "a"), tmp_path / "a"
    shapes = jax.eval_shape(lambda: case.point["head"])
    assert tiny.same(attached(path, case, head=shapes)["head"], case.point["head"])
    other = jax.eval_shape(lambda: {"kernel": jnp.zeros((32, 5)), "bias": jnp.zeros(5)})
    fails(path, case, r"head/bias is \(3,\), expected \(5,\)", head=other)
    fails(path, case, "1 unexpected: head/bias", head={"kernel": shapes["kernel"]})
    edit(path, lambda x: {k: v for k, v in x.items() if not k.startswith("head/")})
    fails(path, case, "2 missing: head/bias, head/kernel", head=shapes)
    assert "head" not in attached(path, case)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.bool_, jnp.int8])
def test_a_leaf_is_never_rounded(tmp_path, dtype):
    case, key = write(tmp_path / "a"), "peft/layers/attn/q/0_lora/a"
    edit(tmp_path / "a", lambda x: x | {key: x[key].astype(dtype)})
    fails(tmp_path / "a", case, f"{key} is {np.dtype(dtype)}, expected float32")


def test_integers_stay_integers(tmp_path):
    case, key = write(tmp_path / "a", "ptuning_v2:length=3"), "peft/embed/prompt/ptuning_v2/by"
    edit(tmp_path / "a", lambda x: x | {key: np.array(3, np.float32)})
    fails(tmp_path / "a", case, f"{key} is float32, expected int32")


def test_a_narrower_float_is_widened(tmp_path):
    case, key = write(tmp_path / "a"), "peft/layers/attn/q/0_lora/a"
    edit(tmp_path / "a", lambda x: x | {key: x[key].astype(np.float16)})
    leaf = tree.paths(attached(tmp_path / "a", case))[key]
    assert leaf.dtype == jnp.float32 and np.array_equal(leaf, np.asarray(leaf).astype(np.float16))


def test_a_type_that_numpy_has_not(tmp_path):
    case, file = write(tmp_path / "a"), tmp_path / "a" / adapter.WEIGHTS
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    fails(tmp_path / "a", case, "damaged: adapter.safetensors has a leaf of an unknown type")


def test_a_huge_specification_allocates_nothing(tmp_path):
    case = write(tmp_path / "a", "prompt:length=3")
    describe(tmp_path / "a", spec="prompt:length=1000000000")
    fails(tmp_path / "a", case, r"is \(3, 32\), expected \(1000000000, 32\)")


def test_another_base_is_refused_unless_forced(tmp_path):
    case = write(tmp_path / "a")
    fails(
        tmp_path / "a",
        case,
        "trained on base tiny \\(ffffffffffff\\), not on this one \\(eeeeeeeeeeee\\)",
        fingerprint="e" * 64,
    )
    variables = attached(tmp_path / "a", case, "e" * 64, force=True)
    assert tiny.same(variables["peft"], case.point["peft"])


def test_leaves_that_do_not_fit(tmp_path):
    case, path = write(tmp_path / "a"), tmp_path / "a"
    key = "peft/layers/attn/q/0_lora/a"
    edit(path, lambda x: {k: v for k, v in x.items() if k != key})
    fails(path, case, f"1 missing: {key}")
    edit(path, lambda x: x | {key: np.zeros((2, 32, 3), np.float32)})
    fails(path, case, f"{key} is \\(2, 32, 3\\), expected \\(2, 32, 2\\)")
    edit(path, lambda x: x | {key: np.zeros((2, 32, 2), np.float32), "peft/layers/attn/w/0_lora/a": np.zeros(3)})
    fails(path, case, "1 unexpected: peft/layers/attn/w/0_lora/a")
    edit(
        path,
        lambda x: {k.replace("attn/w", "attn/v") if "attn/w" in k else k: v for k, v in x.items() if "attn/w" not in k},
    )
    attached(path, case)
    edit(path, lambda x: x | {"optimizer/step": np.zeros(1)})
    fails(path, case, "1 unexpected: optimizer/step")


def test_an_adapter_for_another_shape_of_model(tmp_path):
    write(tmp_path / "a")
    other = tiny.case(SPEC, "encoder", num_layers=3)
    fails(tmp_path / "a", other, r"is \(2, .*expected \(3, ")
    decoder = tiny.case("lora:rank=2", "decoder")
    write(tmp_path / "b", "lora:rank=2", hidden_size=48)
    fails(tmp_path / "b", decoder, "does not fit this model")


@pytest.mark.parametrize("spec", ["full", "bitfit", "layernorm"])
def test_attaching_leaves_the_base_alone(spec, tmp_path):
    case = write(tmp_path / "a", spec)
    before = jax.tree.map(np.array, case.variables["params"])
    variables = attached(tmp_path / "a", case)
    assert tiny.same(jax.tree.map(np.array, case.variables["params"]), before)
    assert tiny.same(variables["params"], case.point["params"]) and not tiny.same(variables["params"], before)
    for path, m in tree.paths(case.mask["params"]).items():
        leaf, old = (tree.paths(p)[path] for p in (variables["params"], case.variables["params"]))
        assert m or leaf is old, "what does not train is the base's own buffer"


def test_a_copied_directory_loads_under_its_new_name(tmp_path):
    case = write(tmp_path / "a", "lora:rank=2")
    shutil.copytree(tmp_path / "a", tmp_path / "bert.layers.0")
    assert tiny.same(attached(tmp_path / "bert.layers.0", case)["peft"], case.point["peft"])


# Method: stored bytes over 4 x trained parameters, where it is not 1; each file says why.
DEARER = {
    "pissa": 2,  # and a frozen copy of the start
    "olora": 2,
    "fishmask": 2,  # and an index for each element
    "lt_sft": 2,
    "sparse_adapter": 1.25 / 0.6,  # dense, and a byte for each that says whether it is there
    "ipt": 5 * 32 / 6,  # the prompt, and not its code
    "prefix": None,  # what the MLP realises, and not the MLP
    "ptuning": None,
    "unipelt": None,
    "mam": None,
    "vera": 1,
}


QUICK = ("lora", "pissa", "bitfit", "vera", "prefix")
STORED = [
    pytest.param(registry.small(n), "encoder", marks=() if n in QUICK else pytest.mark.slow) for n in registry.names()
]


@pytest.mark.parametrize(("spec", "family"), STORED)
def test_stored_bytes_are_those_of_what_trains(spec, family):
    name = spec.partition(":")[0]
    try:
        case = tiny.case(spec, family)
        variables, mask = {k: case.variables[k] for k in ("params", "peft")}, case.mask
    except FlagError:
        return  # a model without what it trains: test_methods.py knows which
    stored = adapter.stored(case.method, variables, case.sites, mask)
    size, trained = sum(x.nbytes for x in stored.values()), 4 * tree.count(variables, {k: mask[k] for k in variables})
    dearer = DEARER.get(name, 1)
    if dearer is None:
        assert size < trained
    else:
        assert size <= 1.05 * dearer * trained + 64
        assert size >= 0.95 * dearer * trained - 64
