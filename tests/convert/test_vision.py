"""ViT and CLIP from and to Hugging Face files, against tiny models that transformers made (make_hf_golden.py)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.convert import config_vision, hf
from research.convert.config import config_from_hf, config_to_hf
from research.convert.export import export_hf, write_safetensors
from research.convert.load import load, load_config
from research.errors import ModelError
from research.models import clip, vit
from research.models.registry import PRESETS
from research.peft import method as peft
from research.peft import tree
from research.vision import preprocess

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ("vit", "vit_bare", "clip")


def outputs(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / name / "outputs.npz"))


@pytest.fixture
def copy(tmp_path):
    """Returns a function that copies a golden directory to where it may be changed."""
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", ["vit", "vit_bare"])
def test_a_vit_has_the_outputs_of_transformers(name, scan):
    base, want = load(str(GOLDEN / name), scan=scan), outputs(name)

    def both(model, x):
        hidden = model(x)
        return hidden, model.logits(x) if model.config.num_classes else None

    hidden, logits = jax.jit(lambda p, x: base.model.apply({"params": p}, x, method=both))(base.params, want["images"])
    np.testing.assert_allclose(hidden, want["hidden"], atol=1e-4)
    assert (logits is None) == (name == "vit_bare")
    if logits is not None:
        np.testing.assert_allclose(logits, want["logits"], atol=1e-4)


def towers(model, images, tokens, mask):
    """All that the golden file has of a CLIP."""
    return {
        "pooled_image": model.vision.features(images), "image_embeds": model.features(images),
        "text_embeds": model.texts(tokens, mask), "logits": model(images, tokens, mask),
    }  # fmt: skip


@pytest.mark.parametrize("scan", [True, False])
def test_clip_has_the_outputs_of_transformers(scan):
    base, want = load(str(GOLDEN / "clip"), scan=scan), outputs("clip")
    run = jax.jit(lambda p, *x: base.model.apply({"params": p}, *x, method=towers))
    given = [want[name] for name in ("images", "tokens", "mask")]
    for name, found in run(base.params, *given).items():
        np.testing.assert_allclose(found, want[name], atol=1e-4, err_msg=name)
    assert np.abs(want["logits"]).max() > 1 and np.ptp(want["logits"]) > 0.5  # else 1e-4 says nothing
    left = [np.stack([np.roll(r, len(m) - m.sum()) for r, m in zip(x, given[2], strict=True)]) for x in given[1:]]
    np.testing.assert_allclose(run(base.params, given[0], *left)["logits"], want["logits"], atol=1e-4)


def test_the_first_files_mark_the_end_by_the_highest_number(copy):
    folder, want = copy("clip"), outputs("clip")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config_dict=text | {"eos_token_id": 2})
    base = load(str(folder))
    assert base.config.eos_token_id == 2
    whole = np.where(want["mask"] > 0, want["tokens"], 0)  # as those files pad
    given = (want["images"], whole, np.ones_like(whole))
    found = jax.jit(lambda p: base.model.apply({"params": p}, *given))(base.params)
    np.testing.assert_allclose(found, want["logits"], atol=1e-4)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_tree_is_the_models_and_every_tensor_comes_back(name, scan, tmp_path):
    base = load(str(GOLDEN / name), scan=scan)
    made = tree.paths(peft.base(base.model)[0])
    assert {k: (v.shape, v.dtype) for k, v in tree.paths(base.params).items()} == {
        k: (v.shape, v.dtype) for k, v in made.items()
    }
    write_safetensors(tmp_path / "x.safetensors", lambda: hf.export_tensors(base.config, base.params))
    theirs, ours = load_file(GOLDEN / name / "model.safetensors"), load_file(tmp_path / "x.safetensors")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key].shape == value.shape and ours[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_directory_loads_as_the_same_base(name, tmp_path):
    base = load(str(GOLDEN / name))
    folder = export_hf(tmp_path / "out", base.config, base.params, base.tokenizer)
    again = load(str(folder), scan=False)
    assert again.fingerprint == base.fingerprint and replace(again.config, scan=True) == base.config
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (folder, GOLDEN / name))
    differ = {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]}
    assert not differ - {"text_config", "vision_config", "id2label", "label2id"} and len(ours) > 8
    for part in ("text_config", "vision_config") if name == "clip" else ():
        assert not {k for k in ours[part].keys() & theirs[part].keys() if ours[part][k] != theirs[part][k]} - {
            "projection_dim"  # theirs says 512 of each tower, and means the whole model's
        }


@pytest.mark.parametrize("name", [*vit.PRESETS, *clip.PRESETS, *NAMES])
def test_every_preset_survives_config_json(name):
    config = load_config(str(GOLDEN / name)) if name in NAMES else PRESETS[name]
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_heads_and_class_names(tmp_path):
    base = load(str(GOLDEN / "vit"))
    assert base.config.num_classes == 3
    names = config_vision.labels(json.loads((GOLDEN / "vit" / "config.json").read_text()))
    assert names == ("cat", "dog", "ship")
    own = export_hf(tmp_path / "own", base.config, base.params, class_names=names)
    assert config_vision.labels(json.loads((own / "config.json").read_text())) == names
    head = {"kernel": jnp.ones((32, 2)), "bias": jnp.zeros(2)}
    other = load(str(export_hf(tmp_path / "new", base.config, base.params, head=head, class_names=["a", "b"])))
    assert other.config.num_classes == 2 and (np.asarray(other.params["head"]["kernel"]) == 1).all()
    bare = load(str(GOLDEN / "vit_bare"))
    put = load(str(export_hf(tmp_path / "put", bare.config, bare.params, head=head)))
    assert put.config == replace(bare.config, num_classes=2)
    clips = load(str(GOLDEN / "clip"))
    wide = {"kernel": jnp.ones((16, 2))}
    with pytest.raises(ModelError, match="CLIPForImageClassification"):
        export_hf(tmp_path / "no", clips.config, clips.params, head=wide)


def test_a_pooler_is_left_out_with_a_line(copy, caplog):
    folder = copy("vit_bare")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"pooler.dense.bias": np.zeros(32, np.float32)}, folder / "model.safetensors")
    assert load(str(folder)).fingerprint == load(str(GOLDEN / "vit_bare")).fingerprint
    assert "left out the file's own head (pooler.dense.bias)" in caplog.text


@pytest.mark.parametrize(("name", "change", "message"), [
    ("vit", {"qkv_bias": False}, "qkv_bias false"), ("vit", {"hidden_act": "tanh"}, "hidden_act 'tanh'"),
    ("vit", {"image_size": [12, 16]}, r"sides \[12, 16\]"), ("vit", {"model_type": "vitt"}, "Did you mean 'vit'"),
    ("clip", {"text_config": {"hidden_act": "silu"}}, "clip config asks for hidden_act 'silu'"),
    ("clip", {"vision_config": 3}, "a value that makes no sense"),
])  # fmt: skip
def test_what_is_not_supported_is_refused(name, change, message):
    with pytest.raises(ModelError, match=message):
        config_from_hf(json.loads((GOLDEN / name / "config.json").read_text()) | change)


def test_a_vit_without_a_class_token_has_no_place_in_transformers():
    with pytest.raises(ModelError, match="pooling by gap"):
        config_to_hf(replace(vit.PRESETS["vit-b16"], pooling="gap"))
    with pytest.raises(ModelError, match="another start"):
        config_to_hf(PRESETS["clip-vit-b32"].vision)


def test_pixels_are_the_files_own_or_the_familys(tmp_path):
    assert config_vision.pixels(tmp_path, "vit") == preprocess.HALF
    assert config_vision.pixels(tmp_path, "clip") == preprocess.CLIP
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}))
    assert config_vision.pixels(tmp_path, "clip") == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    file.write_text(json.dumps({"do_normalize": False}))
    assert config_vision.pixels(tmp_path, "vit") == ((0.0,), (1.0,))
    file.write_text("[")
    with pytest.raises(ModelError, match="no preprocessing"):
        config_vision.pixels(tmp_path, "vit")
