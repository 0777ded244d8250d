"""Adapters of Hugging Face PEFT, in and out, against directories that it made (tests/golden/make_hf_peft_golden.py)."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.convert import hf_peft
from research.convert.hf_peft_methods import TYPES
from research.convert.load import Pretrained, load
from research.errors import ModelError
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import registry, tree
from research.tasks import classify
from tests import tiny
from tests.experiments.script import refused, run

GOLDEN = Path(__file__).parent.parent / "golden"
HERE = GOLDEN / "hf_peft"
NAMES = sorted(folder.name for folder in HERE.iterdir() if folder.is_dir() and folder.name != "base")
BASES = {"lora_bert": "bert_cls", "prompt_bert": "bert", "prefix_bert": "bert", "prompt_head": "llama_cls"}
QUICK = ("lora", "dora", "ia3", "vera", "fourierft", "adalora", "llama_adapter", "prefix", "prompt", "lokr")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
OUTPUTS = dict(np.load(HERE / "outputs.npz"))


@functools.cache
def base(name: str, scan: bool = True) -> tuple[Pretrained, dict]:
    """The model of a case, and its sites."""
    folder = GOLDEN / "bert" if "bert" in name else HERE / "base"
    model = load(str(folder), scan=scan)
    return model, peft.sites(model.model)


@functools.cache
def read(name: str, scan: bool = True) -> hf_peft.Loaded:
    model, sites = base(name, scan)
    return hf_peft.load(HERE / name, model.config, model.params, sites)


def outputs(name: str, spec: str, variables: dict, scan: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(ours, the base's) where there are real tokens."""
    model, sites = base(name, scan)
    kind = BASES.get(name, "llama")
    batch = {"tokens": OUTPUTS[f"{kind}/input_ids"], "mask": OUTPUTS[f"{kind}/attention_mask"]}
    v = peft.realised(registry.parse(spec), variables, sites)
    if kind.endswith("_cls"):
        return np.asarray(jax.jit(lambda v: classify.logits(model.model, v, batch))(v)), OUTPUTS[kind]
    method = "logits" if kind == "llama" else "__call__"
    v = {k: v[k] for k in ("params", "peft", "shared") if k in v}
    out = jax.jit(lambda v: model.model.apply(v, batch["tokens"], batch["mask"], method=method))(v)
    return np.asarray(out)[batch["mask"] == 1], OUTPUTS[kind][batch["mask"] == 1]


def wanted(name: str) -> np.ndarray:
    want = OUTPUTS[name]
    return want[OUTPUTS[f"{BASES.get(name, 'llama')}/attention_mask"] == 1] if want.ndim == 3 else want


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def equal(found: dict[str, np.ndarray], want: dict[str, np.ndarray], name: str) -> None:
    """Byte for byte. VeRA's shared matrices are written where the file left them out, too."""
    more = {"base_model.vera_A", "base_model.vera_B"} if name == "vera_unsaved" else set()
    assert set(found) == set(want) | more
    for key, x in want.items():
        assert (found[key].dtype, found[key].shape, found[key].tobytes()) == (x.dtype, x.shape, x.tobytes()), key


@pytest.fixture
def copy(tmp_path):
    """Returns a function that copies a golden directory, changes its configuration and its tensors."""

    def make(name: str, change=lambda tensors: None, **options) -> Path:
        folder = Path(shutil.copytree(HERE / name, tmp_path / name))
        changed = tensors(folder)
        change(changed)
        save_file(changed, folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text()) | options
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


def refuses(folder: Path, name: str, match: str) -> None:
    model, sites = base(name)
    with pytest.raises(ModelError, match=match) as error:
        hf_peft.load(folder, model.config, model.params, sites)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_every_method_has_a_golden_directory():
    kinds = {json.loads((HERE / name / "adapter_config.json").read_text())["peft_type"] for name in NAMES}
    assert kinds == set(TYPES)


@pytest.mark.parametrize("name", EACH)
def test_outputs_are_those_of_hugging_face_peft(name):
    found, bare = outputs(name, *read(name)[:2])
    np.testing.assert_allclose(found, wanted(name), atol=1e-5)
    assert np.abs(found - bare).max() > 0.1


@pytest.mark.parametrize("name", ["adalora_pruned", "llama_adapter", "lora_layers", "lora_patterns", "prefix", "vera"])
def test_an_unrolled_model_reads_and_writes_the_same(name, tmp_path):
    spec, variables, _ = read(name, scan=False)
    assert spec == read(name).spec
    np.testing.assert_allclose(outputs(name, spec, variables, scan=False)[0], wanted(name), atol=1e-5)
    model, sites = base(name, scan=False)
    hf_peft.save(tmp_path / "out", spec, variables, model.config, sites)
    equal(tensors(tmp_path / "out"), tensors(HERE / name), name)


@pytest.mark.parametrize("name", EACH)
def test_a_round_trip_keeps_every_byte(name, tmp_path):
    """Theirs -> ours -> our own directory -> ours -> theirs."""
    (model, sites), (spec, variables, _) = base(name), read(name)
    folders = [tmp_path / "one", tmp_path / "two"]
    hf_peft.save(folders[0], spec, variables, model.config, sites)
    adapters.save(tmp_path / "ours", spec, variables, sites, {"name": "x", "fingerprint": "y"})
    again = adapters.attach(adapters.load(tmp_path / "ours"), model.params, sites, "y")
    hf_peft.save(folders[1], spec, again, model.config, sites)
    for folder in folders:
        equal(tensors(folder), tensors(HERE / name), name)


@pytest.mark.parametrize("name", EACH)
def test_what_is_written_says_what_was_read(name, tmp_path):
    """Their options come back, but for those of training, a block count given as a size, and patterns by full names."""
    (model, sites), (spec, variables, _) = base(name), read(name)
    hf_peft.save(tmp_path / "out", spec, variables, model.config, sites, "tiny")
    theirs, ours = (json.loads((d / "adapter_config.json").read_text()) for d in (HERE / name, tmp_path / "out"))
    free = {
        "target_modules",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "oft_block_size",
        "r",
        "save_projection",
    }
    assert {k: v for k, v in ours.items() if k not in free} == {k: theirs[k] for k in ours if k not in free}
    if theirs.get("r") and name != "oft_cayley" and "r" in ours:
        assert ours["r"] == theirs["r"]
    assert hf_peft.load(tmp_path / "out", model.config, model.params, sites).spec == spec


def test_ranks_scales_and_layers_that_differ():
    assert read("lora_layers").spec == "lora:rank=4,alpha=12,targets=attn/(q|v),layers=1"
    spec, variables, _ = read("lora_patterns")
    assert "rank_pattern=attn/k:2|mlp/down:4" in spec and "alpha_pattern=mlp/down:5" in spec
    q = variables["peft"]["layers"]["attn"]["q"]["lora"]
    assert q.a.shape == (2, 32, 6) and not q.a[0, :, 4:].any() and q.a[1].all()
    np.testing.assert_allclose(q.scale, [12 / 4, 12 / 6])
    uneven = read("lora_uneven").variables["peft"]["layers"]
    assert not uneven["attn"]["k"]["lora"].b[0].any() and not uneven["mlp"]["down"]["lora"].b[1].any()
    lam = read("adalora_pruned").variables["peft"]["layers"]["attn"]["q"]["adalora"].lam
    np.testing.assert_array_equal(lam != 0, [[1, 0, 1, 0], [0, 0, 0, 0]])


def test_half_precision_files_are_read_exactly(copy):
    half = {}

    def change(tensors):
        half.update({k: x.astype(np.float16) for k, x in tensors.items()})
        tensors.update(half)

    model, sites = base("lora")
    loaded = hf_peft.load(copy("lora", change), model.config, model.params, sites)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    a = loaded.variables["peft"]["layers"]["attn"]["v"]["lora"].a
    assert a.dtype == jnp.float32
    np.testing.assert_array_equal(a[1].T, half[key].astype(np.float32))


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop(KEY), f"1 missing: {KEY}"),
        (lambda t: t.update({KEY + "x": t[KEY]}), f"1 unexpected: {KEY}x"),
        (lambda t: t.update({KEY: t[KEY][:2]}), rf"{KEY} has shape \[2, 32\], the configuration wants \[4, 32\]"),
        (lambda t: t.update({KEY: t[KEY].astype(np.int32)}), f"{KEY} is of type int32"),
        (lambda t: t.update({KEY.replace("A.weight", "embedding_A"): t[KEY]}), "1 unexpected: .*lora_embedding_A"),
        (lambda t: t.update({k.replace("A.w", "B.w"): t.pop(k) for k in [KEY]}), "shape|missing"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "embedding", "swapped"],
)
def test_tensors_that_do_not_fit(copy, change, match):
    refuses(copy("lora", change), "lora", match)


def test_places_outside_a_kernel(copy):
    def change(tensors):
        key = "base_model.model.model.layers.1.self_attn.v_proj.shira_indices"
        tensors[key] = tensors[key][::-1].copy()  # (in, out) for (out, in)

    refuses(copy("shira", change), "shira", r"v_proj.shira_indices has places outside a kernel \[16, 32\]")


def test_names_of_a_bare_decoder(copy):
    """LlamaModel, as embedding models are saved: no `model.` before the layers."""

    def change(tensors):
        for key in list(tensors):
            tensors[key.replace("model.model.model.", "model.model.")] = tensors.pop(key)

    model, sites = base("lora")
    folder = copy("lora", change, task_type="FEATURE_EXTRACTION")
    loaded = hf_peft.load(folder, model.config, model.params, sites)
    assert tiny.same(loaded.variables["peft"], read("lora").variables["peft"])


@pytest.mark.parametrize("name", EACH)
def test_a_tensor_more_or_less_is_refused_for_every_method(copy, name):
    def change(tensors):
        first = sorted(tensors)[0]
        tensors["other"] = tensors.pop(first)

    refuses(copy(name, change), name, "missing|no tensor's name")


@pytest.mark.parametrize(
    "name, options, match",
    [
        ("lora", {"peft_type": "LOHAS"}, "Did you mean 'LOHA'"),
        ("lora", {"peft_type": "C3A"}, "peft_type 'C3A' has no counterpart"),
        ("lora", {"bias": "all"}, 'bias="all" has no counterpart'),
        ("lora", {"lora_bias": True}, "lora_bias=true"),
        ("lora", {"fan_in_fan_out": True}, "fan_in_fan_out=true"),
        ("lora", {"modules_to_save": ["lm_head"]}, "modules_to_save=lm_head"),
        ("lora", {"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
        ("lora", {"layer_replication": [[0, 2]]}, "layer_replication="),
        ("lora", {"an_option_of_the_future": 3}, "an_option_of_the_future=3"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base's own weights"),
        ("lora", {"task_type": "TOKEN_CLS"}, "task_type TOKEN_CLS"),
        ("lora", {"target_modules": None}, "names no target_modules"),
        ("lora", {"target_modules": ["c_attn"]}, r"\['c_attn'\] matches no projection"),
        ("lora", {"target_modules": "(q_proj"}, "not a regular expression"),
        ("lora", {"target_modules": ["q_proj"]}, "4 unexpected"),
        ("lora", {"layers_to_transform": [0]}, "4 unexpected"),
        ("lora", {"exclude_modules": ["q_proj"]}, "4 unexpected"),
        ("lora", {"r": "many"}, "makes no sense"),
        ("lora", {"r": 5}, r"shape \[4, 32\], the configuration wants \[5, 32\]"),
        ("lora", {"rank_pattern": {"q_proj": 2}}, r"shape \[4, 32\], the configuration wants \[2, 32\]"),
        (
            "dora",
            {"target_modules": r".*(0\.self_attn\.q|1\.self_attn\.v)_proj"},
            "in some layers and others in others",
        ),
        ("adalora", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, "1 entries .* init_r is 4"),
        ("oft", {"coft": True}, "coft=true"),
        ("fourierft", {"n_frequency_pattern": {"q_proj": 7}}, "n_frequency_pattern"),
        ("lora_bert", {"modules_to_save": None}, "2 unexpected: base_model.model.classifier.bias"),
        ("prompt_bert", {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}, "first virtual token"),
        ("prompt", {"num_virtual_tokens": 6}, r"shape \[5, 32\], the configuration wants \[6, 32\]"),
    ],
)
def test_options_without_a_counterpart(copy, name, options, match):
    refuses(copy(name, **options), name, match)


def test_directories_that_are_none(tmp_path, copy):
    refuses(tmp_path, "lora", "no adapter_config.json")
    folder = copy("lora")
    (folder / "adapter_config.json").write_text("{")
    refuses(folder, "lora", "cannot be read as JSON")
    (folder / "adapter_config.json").write_text("[]")
    refuses(folder, "lora", "adapter_config.json")
    shutil.copy(HERE / "lora" / "adapter_config.json", folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refuses(folder, "lora", "not a whole safetensors file")
    weights.rename(folder / "adapter_model.bin")
    refuses(folder, "lora", "only pickled weights")
    (folder / "adapter_model.bin").unlink()
    refuses(folder, "lora", "no adapter_model.safetensors")


def test_what_training_alone_needs_is_noted(copy):
    model, sites = base("vera")
    loaded = hf_peft.load(copy("vera", vera_dropout=0.1), model.config, model.params, sites)
    assert loaded.notes == ("vera_dropout=0.1, which matters in training only, is left out",)
    assert "prefix_projection" in read("prefix_mlp").notes[0]
    assert read("lora").notes == () and "dropout=0.1" in read("lora").spec


@functools.cache
def made(spec: str, name: str = "lora") -> dict:
    """Base and an adapter of ours at a random point."""
    (model, sites), method = base(name), registry.parse(spec)
    variables = {"params": model.params, "peft": peft.init(method, jax.random.key(0), sites)}
    if spec.startswith("pissa"):
        variables = method.fit(jax.random.key(1), variables, None, None)
    trained, rest = tree.partition(variables["peft"], peft.mask(method, variables)["peft"])
    return variables | {"peft": tree.combine(tiny.noise(trained), rest)}


@pytest.mark.parametrize("spec", ["pissa:rank=3", "lora_fa:rank=3", "lokr:rank=2", "prefix:hidden=4"])
def test_nodes_of_ours_are_written_whatever_made_them(spec, tmp_path):
    (model, sites), variables = base("lora"), made(spec)
    twice = lambda path, x: x * jnp.asarray([1.0, 2.0]) if path.endswith("/scale") else x  # noqa: E731
    variables = variables | {"peft": tree.map_with_path(twice, variables["peft"])}  # layers may differ in it
    hf_peft.save(tmp_path / "out", spec, variables, model.config, sites)
    loaded = hf_peft.load(tmp_path / "out", model.config, model.params, sites)
    want, bare = outputs("lora", spec, variables)
    np.testing.assert_allclose(outputs("lora", loaded.spec, loaded.variables)[0], want, atol=1e-5)
    assert np.abs(want - bare).max() > 1e-3


def test_ranks_of_zeros_are_not_written(tmp_path):
    """EVA leaves some out, and says so by zeros."""
    (model, sites), spec = base("lora"), "eva:rank=2,rho=2,targets=attn/q"
    node = made(spec)["peft"]["layers"]["attn"]["q"]["eva"]
    node = node.replace(a=node.a.at[1, :, 1:].set(0.0), b=node.b.at[1, 1:].set(0.0))
    variables = made(spec) | {"peft": {"layers": {"attn": {"q": {"eva": node}}}}}
    hf_peft.save(tmp_path / "out", spec, variables, model.config, sites)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 1}
    assert config["lora_alpha"] == 32 and config["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 8}
    assert {k: x.shape[0] for k, x in tensors(tmp_path / "out").items() if "_A" in k and "1.self" in k} == {KEY: 1}


@pytest.mark.parametrize(
    "spec, match",
    [
        ("houlsby:width=4", "houlsby has no counterpart"),
        ("krona", "krona has no counterpart"),
        ("lora+prompt:length=2", "several methods"),
        ("full", "full has no counterpart"),
        ("hira:rank=2,scale=2", "scale other than 1"),
        ("fourierft:frequencies=5", "not those that torch draws"),
        ("prefix:length=2,hidden=0,layers=0", "in some layers only"),
        ("llama_adapter:layers=0", "top layers"),
    ],
)
def test_what_they_have_not_is_not_written(spec, match, tmp_path):
    model, sites = base("lora")
    with pytest.raises(ModelError, match=match):
        hf_peft.save(tmp_path / "out", spec, made(spec), model.config, sites)
    assert not (tmp_path / "out").exists()


def test_somebody_elses_directory_is_left_alone(tmp_path, copy):
    (model, sites), (spec, variables, _) = base("lora"), read("lora")
    theirs = copy("lora")
    with pytest.raises(ModelError, match="holds something else"):
        hf_peft.save(theirs, spec, variables, model.config, sites)
    equal(tensors(theirs), tensors(HERE / "lora"), "lora")
    for _ in range(2):  # our own is written over
        hf_peft.save(tmp_path / "out", spec, variables, model.config, sites)


@pytest.mark.slow
def test_the_script_converts_both_ways(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    arguments = [f"--adapter={HERE / 'lora_bert'}", "--to=peftree", f"--output={ours}", f"--model={GOLDEN / 'bert'}"]
    outcome = run("convert_adapter", *arguments, "--classes=a,b,c")
    assert outcome.status == 0 and "written" in outcome.out, outcome
    meta = json.loads((ours / "adapter.json").read_text())
    assert (meta["spec"], meta["classes"]) == (read("lora_bert").spec, ["a", "b", "c"])
    outcome = run("convert_adapter", f"--adapter={ours}", "--to=hf", f"--output={theirs}")
    assert outcome.status == 0 and "equal within" in outcome.out, outcome
    equal(tensors(theirs), tensors(HERE / "lora_bert"), "lora_bert")
    refused(run("convert_adapter", f"--adapter={theirs}", "--to=hf", f"--output={tmp_path / 'x'}"), 4, "adapter.json")
    refused(run("convert_adapter", *arguments, "--classes=a"), 2, "the head has 3")
    refused(
        run("convert_adapter", f"--adapter={ours}", "--to=peftree", f"--output={tmp_path / 'x'}"), 4, "adapter_config"
    )


def test_scales_without_a_feed_forward_one(copy, tmp_path):
    def drop(tensors):
        for key in [key for key in tensors if "down_proj" in key]:
            del tensors[key]

    folder = copy("ia3", drop, target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    model, sites = base("ia3")
    found = hf_peft.load(folder, model.config, model.params, sites)
    assert registry.parse(found.spec) and "feedforward=" in found.spec
    hf_peft.save(tmp_path / "out", found.spec, found.variables, model.config, sites)
    equal(tensors(tmp_path / "out"), tensors(folder), "ia3")


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_part_of_a_fused_projection_is_not_written(name, tmp_path):
    model = load(str(GOLDEN / name))
    sites = peft.sites(model.model)

    def write(spec):
        added = peft.init(registry.parse(spec), jax.random.key(0), sites)
        hf_peft.save(tmp_path / "x", spec, {"params": model.params, "peft": added}, model.config, sites)

    with pytest.raises(ModelError, match="no module for this projection alone"):
        write("lora:rank=2,targets=attn/(v|o)")
    assert not (tmp_path / "x").exists()
    write("lora:rank=2,targets=attn/o|mlp/up")
    assert len(load_file(tmp_path / "x" / "adapter_model.safetensors")) == 2 * 2 * 2
