"""Hugging Face files, in and out, against tiny models that transformers made (tests/golden/make_hf_golden.py)."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.convert import hf
from research.convert.config import config_from_hf, config_to_hf
from research.convert.export import write_safetensors
from research.convert.load import load, load_config
from research.convert.names import shape_of, table
from research.errors import ModelError
from research.models import bert, bloom, gemma, gpt2, llama, t5
from research.models.registry import PRESETS, build
from research.peft import tree
from research.train.mesh import make_mesh, shardings

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ("bert", "roberta", "gpt2", "bloom", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
SEQ2SEQ = ("t5", "t5_1_1")


def pad_left(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Moves each row's padding from its right end to its left."""
    return np.stack([np.roll(row, len(m) - int(m.sum()), axis=0) for row, m in zip(x, mask, strict=True)])


@pytest.fixture
def copy(tmp_path):
    """Returns a function that copies a golden directory to where it may be damaged."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return make


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the tensors of a directory's safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_transformers(name, side, scan):
    base = load(str(GOLDEN / name), scan=scan)
    want = dict(np.load(GOLDEN / name / "outputs.npz"))
    if side == "left":
        want |= {k: pad_left(v, want["mask"]) for k, v in want.items() if k != "pooled"}
    tokens, mask, real = jnp.asarray(want["tokens"]), jnp.asarray(want["mask"]), want["mask"] == 1
    variables = {"params": base.params}
    hidden = np.asarray(jax.jit(base.model.apply)(variables, tokens, mask))
    np.testing.assert_allclose(hidden[real], want["hidden"][real], atol=1e-4)
    if "logits" in want:
        logits = np.asarray(
            jax.jit(base.model.apply, static_argnames="method")(variables, tokens, mask, method="logits")
        )
        np.testing.assert_allclose(logits[real], want["logits"][real], atol=1e-4)
    if "pooled" in want:
        features = base.model.apply(variables, tokens, mask, method="features")
        np.testing.assert_allclose(features, want["pooled"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_outputs_of_an_encoder_decoder_are_those_of_transformers(name, side, scan):
    base, want = load(str(GOLDEN / name), scan=scan), dict(np.load(GOLDEN / name / "outputs.npz"))
    if side == "left":
        want |= {k: pad_left(want[k], want["mask"]) for k in ("tokens", "mask")}
    run = jax.jit(base.model.apply, static_argnames="method")
    given = ({"params": base.params}, *(jnp.asarray(want[k]) for k in ("tokens", "mask", "targets")))
    np.testing.assert_allclose(run(*given), want["hidden"], atol=1e-4)
    np.testing.assert_allclose(run(*given, method="logits"), want["logits"], atol=1e-4)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", NAMES + SEQ2SEQ)
def test_tree_is_the_one_the_model_makes(name, scan):
    base = load(str(GOLDEN / name), scan=scan)
    init = jax.eval_shape(base.model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    ours = {k: (v.shape, v.dtype) for k, v in tree.paths(base.params).items()}
    # A boxed leaf's path ends with its box's field.
    assert ours == {k.removesuffix("/value"): (v.shape, v.dtype) for k, v in tree.paths(init).items()}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", NAMES + SEQ2SEQ)
def test_export_gives_back_every_tensor_bit_by_bit(name, scan, tmp_path):
    base = load(str(GOLDEN / name), scan=scan)
    write_safetensors(tmp_path / "x.safetensors", lambda: hf.export_tensors(base.config, base.params))
    theirs, ours = load_file(GOLDEN / name / "model.safetensors"), load_file(tmp_path / "x.safetensors")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


@pytest.mark.parametrize("name", NAMES + SEQ2SEQ)
def test_config_round_trip(name):
    config = load_config(str(GOLDEN / name))
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("name", [name for family in (bert, bloom, gemma, gpt2, llama, t5) for name in family.PRESETS])
def test_every_preset_survives_config_json(name):
    config = PRESETS[name]
    back = config_from_hf(json.loads(json.dumps(config_to_hf(config))))
    assert back == config


def test_older_config_files_say_the_same():
    new = json.loads((GOLDEN / "llama" / "config.json").read_text())
    rope = new.pop("rope_parameters")
    old = new | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert config_from_hf(old) == load_config(str(GOLDEN / "llama"))
    assert config_from_hf(old).rope_scaling == ("llama3", 8.0, 1.0, 4.0, 64)


def test_sliding_window_counts_only_where_the_family_uses_it():
    qwen = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    qwen.pop("layer_types")
    assert config_from_hf(qwen | {"sliding_window": 4, "use_sliding_window": False}).sliding_window is None
    on = qwen | {"sliding_window": 4, "use_sliding_window": True}
    assert config_from_hf(on | {"max_window_layers": 0}).sliding_window == 4
    assert config_from_hf(on | {"max_window_layers": 2}).sliding_window is None
    with pytest.raises(ModelError, match="some layers only"):
        config_from_hf(on | {"max_window_layers": 1})
    assert load_config(str(GOLDEN / "mistral")).sliding_window == 8


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"model_type": "lama"}, r"model_type 'lama'.*Did you mean 'llama'"),
        ("llama", {"model_type": "t6"}, r"model_type 't6'.*Valid: bert, .*llama, mistral"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"num_attention_heads": 0, "head_dim": None}, "a value that makes no sense"),
        ("llama", {"rope_parameters": "llama3"}, "a value that makes no sense"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("bert", {"hidden_act": "tanh"}, "hidden_act 'tanh'"),
    ],
)
def test_what_is_not_supported_is_refused(name, change, message):
    with pytest.raises(ModelError, match=message):
        config_from_hf(json.loads((GOLDEN / name / "config.json").read_text()) | change)


def test_config_without_a_size_names_it():
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    del config["hidden_size"]
    with pytest.raises(ModelError, match="llama model has no 'hidden_size'"):
        config_from_hf(config)


def test_prefixes_old_spellings_buffers_and_heads_are_understood(copy, caplog):
    folder = copy("bert")

    def change(tensors):
        for key in list(tensors):
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"bert.{old}"] = tensors.pop(key)
        tensors["bert.embeddings.position_ids"] = np.arange(40)[None]
        tensors["cls.predictions.bias"] = tensors["classifier.weight"] = np.zeros(3, np.float32)

    rewrite(folder, change)
    assert load(str(folder)).fingerprint == load(str(GOLDEN / "bert")).fingerprint
    assert "classifier.weight" in caplog.text and "cls.predictions.bias" in caplog.text


def test_bare_llama_files_and_a_redundant_tied_head(copy):
    folder = copy("qwen2")

    def bare(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].copy()

    rewrite(folder, bare)
    assert load(str(folder)).fingerprint == load(str(GOLDEN / "qwen2")).fingerprint
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].__iadd__(1))
    with pytest.raises(ModelError, match="lm_head.weight differs"):
        load(str(folder))


def test_bert_without_pooler_weights_has_none(copy):
    folder = copy("bert")
    rewrite(folder, lambda tensors: [tensors.pop(f"pooler.dense.{x}") for x in ("weight", "bias")])
    base = load(str(folder))
    assert not base.config.pooler and "pooler" not in base.params


def test_missing_and_unexpected_names_are_listed_and_counted(copy):
    folder = copy("llama")

    def change(tensors):
        tensors["model.layers.0.mlp.gate.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
        for i in range(30):
            tensors[f"model.extra.{i:02}"] = np.zeros(1, np.float32)

    rewrite(folder, change)
    with pytest.raises(ModelError) as error:
        load(str(folder))
    text = str(error.value)
    assert "1 names missing (layers.0.mlp.gate_proj.weight)" in text and "31 names unexpected (extra.00, " in text
    assert "extra.09, ..." in text and "extra.10" not in text and "\n" not in text


def test_more_layers_in_the_file_than_in_the_config_is_an_error(copy):
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ModelError, match="9 names unexpected"):
        load(str(folder))


def test_a_wrong_shape_names_the_leaf_and_both_shapes(copy):
    folder = copy("llama")
    key = "model.layers.1.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.__setitem__(key, np.zeros((32, 32), np.float32)))
    with pytest.raises(
        ModelError, match=r"k_proj.weight has shape \[32, 32\].*\[16, 32\] \(for layers/attn/k/kernel\)"
    ):
        load(str(folder))


def test_bfloat16_files_and_parameters(copy):
    folder = copy("llama")
    rewrite(folder, lambda tensors: tensors.update({k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}))
    exact = load(str(folder), param_dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(exact.params)} == {"bfloat16"}
    key = "model.layers.1.mlp.up_proj.weight"
    want = load_file(folder / "model.safetensors")[key]
    np.testing.assert_array_equal(np.asarray(exact.params["layers"]["mlp"]["up"]["kernel"])[1].T, want)
    wide = load(str(folder)).params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(np.asarray(wide)[1].T, want.astype(np.float32))


def test_sharded_files_and_a_lost_shard(copy):
    folder = copy("llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [dict(list(tensors.items())[:7]), dict(list(tensors.items())[7:])]
    where = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert load(str(folder)).fingerprint == load(str(GOLDEN / "llama")).fingerprint
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 shards missing \(model-1.safetensors\)"):
        load(str(folder))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data.replace(b'"F32"', b'"F64"', 1),
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
    ],
    ids=["cut", "stub", "empty", "json", "dtype", "length"],
)
def test_truncated_and_altered_files_are_one_line(copy, damage):
    file = copy("bert") / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match="not a whole safetensors file") as error:
        load(str(file.parent))
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_pickles_are_refused(copy):
    folder = copy("bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load(str(folder))


def test_the_table_covers_a_full_size_model():
    """Shapes from the table alone agree with those of the real module."""
    for name in ("roberta-large", "gpt2-xl", "qwen3-8b", "llama3.2-1b"):
        config = PRESETS[name]
        init = jax.eval_shape(build(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        shapes = {k.removesuffix("/value"): v.shape for k, v in tree.paths(init).items()}
        stacked = {"layers": (config.num_layers,)}
        ours = {r.ours: stacked.get(r.ours.split("/")[0], ()) + shape_of(config, r) for r in table(config)}
        assert ours == shapes


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_straight_into_shards(name, scan, monkeypatch):
    """Each device holds its own part, the numbers are the same, and no kernel that is sharded is ever read whole."""
    want, asked = load(str(GOLDEN / name), scan=scan), []
    real = hf.SafetensorsSource.read

    def read(self, tensor, index=()):
        value = real(self, tensor, index)
        asked.append((tensor, value.size))
        return value

    monkeypatch.setattr(hf.SafetensorsSource, "read", read)
    mesh = make_mesh("fsdp:4,tensor:2")
    got = load(str(GOLDEN / name), scan=scan, places=lambda axes, shapes: shardings(axes, shapes, mesh))
    assert got.fingerprint == want.fingerprint
    kernels = {path: leaf for path, leaf in tree.paths(got.params).items() if "kernel" in path and "layers" in path}
    assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in kernels.values())
    if name != "gpt2":  # whose q, k and v are one tensor
        most = max(size for tensor, size in asked if "self_attn.q_proj" in tensor or "SelfAttention.q." in tensor)
        assert most == 32 * 32 // 8
