"""Exported directories: names and config keys are those that transformers wrote for the golden models."""

import errno
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from research.convert import export
from research.convert.export import export_hf
from research.convert.load import load
from research.errors import ModelError

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ("bert", "roberta", "gpt2", "bloom", "llama", "mistral", "qwen2", "qwen3")


def names(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_exported_directory_loads_as_the_same_base(name, tmp_path):
    base = load(str(GOLDEN / name))
    folder = export_hf(tmp_path / "out", base.config, base.params)
    again = load(str(folder))
    assert (again.fingerprint, again.config) == (base.fingerprint, base.config)
    assert names(folder) == names(GOLDEN / name)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (folder, GOLDEN / name))
    assert ours["architectures"] == theirs["architectures"]
    # transformers' own keys, where we write them, have transformers' own values.
    differ = {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]}
    assert not differ - {"max_window_layers"}
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_bfloat16_and_unrolled(tmp_path):
    base = load(str(GOLDEN / "llama"), param_dtype="bfloat16", scan=False)
    folder = export_hf(tmp_path / "out", base.config, base.params)
    assert load(str(folder), param_dtype="bfloat16").fingerprint == base.fingerprint
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_classifier_on_bert(tmp_path):
    base = load(str(GOLDEN / "bert"))
    kernel = np.arange(64, dtype=np.float32).reshape(32, 2)
    head = {"kernel": jnp.asarray(kernel), "bias": jnp.array([1.0, 2.0])}
    folder = export_hf(tmp_path / "out", base.config, base.params, head=head, class_names=["no", "yes"])
    bare = names(GOLDEN / "bert")
    assert names(folder) == {f"bert.{name}" for name in bare} | {"classifier.weight", "classifier.bias"}
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    np.testing.assert_array_equal(tensors["classifier.weight"], kernel.T)
    np.testing.assert_array_equal(tensors["classifier.bias"], [1.0, 2.0])
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes"} and config["label2id"] == {"no": 0, "yes": 1}
    assert load(str(folder)).fingerprint == base.fingerprint  # the head is left out again, and reported


def test_classifier_on_a_llama_has_a_score_and_no_lm_head(tmp_path):
    base = load("smoke-llama")
    head = {"kernel": jnp.ones((32, 3))}
    folder = export_hf(tmp_path / "out", base.config, base.params, tokenizer=base.tokenizer, head=head)
    assert load_file(folder / "model.safetensors")["score.weight"].shape == (3, 32)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 3
    assert config["pad_token_id"] == base.tokenizer.pad_token_id  # it finds the last real token by this id
    untied = load(str(GOLDEN / "llama"))
    folder = export_hf(tmp_path / "untied", untied.config, untied.params, head=head)
    assert names(folder) == names(GOLDEN / "llama") - {"lm_head.weight"} | {"score.weight"}


def test_heads_that_transformers_has_no_class_for_are_refused(tmp_path):
    head = {"kernel": jnp.ones((32, 2)), "bias": jnp.zeros(2)}
    for name, message in (("llama", "LlamaForSequenceClassification has no bias"), ("roberta", "one dense layer more")):
        base = load(str(GOLDEN / name))
        with pytest.raises(ModelError, match=message):
            export_hf(tmp_path / "out", base.config, base.params, head=head)
    base = load(str(GOLDEN / "bert"))
    with pytest.raises(ModelError, match=r"kernel has shape \[32, 2\].*\[32, 3\]"):
        export_hf(tmp_path / "out", base.config, base.params, head=head, class_names="abc")
    assert not list(tmp_path.iterdir())


def test_tokenizer_comes_along(tmp_path):
    base = load("smoke")
    folder = export_hf(tmp_path / "out", base.config, base.params, tokenizer=base.tokenizer)
    again = load(str(folder))
    text = "The soup was a lovely surprise."
    assert again.tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert again.tokenizer.pad_token_id == base.tokenizer.pad_token_id
    assert again.fingerprint == base.fingerprint


def test_unmerged_or_incomplete_parameters_are_refused(tmp_path):
    base = load(str(GOLDEN / "llama"))
    params = base.params | {"norm": {}}
    with pytest.raises(ModelError, match="no array at norm/scale"):
        export_hf(tmp_path / "out", base.config, params)
    params = base.params | {"norm": {"scale": jnp.ones(31)}}
    with pytest.raises(ModelError, match=r"norm/scale: shape \(31,\)"):
        export_hf(tmp_path / "out", base.config, params)
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    base, other = load("smoke"), load("smoke", seed=1)
    folder = tmp_path / "out"
    folder.mkdir()
    export_hf(folder, base.config, base.params)
    (folder / "stale.txt").write_text("x")
    export_hf(folder, other.config, other.params)
    assert load(str(folder)).fingerprint == other.fingerprint and not (folder / "stale.txt").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds something else"):
        export_hf(mine, base.config, base.params)
    assert [p.name for p in mine.iterdir()] == ["config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_full_disk_leaves_the_earlier_export_and_says_what_was_needed(tmp_path, monkeypatch):
    base, other = load("smoke"), load("smoke", seed=1)
    folder = export_hf(tmp_path / "out", base.config, base.params)

    def full(file, tensors):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_safetensors", full)
    with pytest.raises(ModelError, match=r"disk full: .*out needs more than \d+ bytes, \d+ are free") as error:
        export_hf(folder, other.config, other.params)
    assert "\n" not in str(error.value)
    assert load(str(folder)).fingerprint == base.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_parent_that_is_a_file(tmp_path):
    base = load("smoke")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write .*file/out"):
        export_hf(tmp_path / "file" / "out", base.config, base.params)
