"""Hugging Face vision transformers as bases of `experiments.vision`."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.shared import attention, images, vit_base
from research.errors import ModelError
from research.peft import method as peft
from research.peft import registry
from research.vision import preprocess

GOLDEN = Path(__file__).parent.parent / "golden"


def features(base: vit_base.VitBase, x: np.ndarray) -> np.ndarray:
    return jax.jit(lambda p, x: base.model.apply({"params": p}, x, method="features"))(base.params, x)


def test_a_vit_keeps_its_head_apart_and_classifies_by_it(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "vit", tmp_path / "vit"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    base, want = vit_base.load(str(folder), drop_path=0.1), dict(np.load(GOLDEN / "vit" / "outputs.npz"))
    assert base.classes == ("cat", "dog", "ship") and base.std == (0.25,) * 3 and base.config.num_classes == 0
    assert "head" not in base.params and base.head["kernel"].shape == (32, 3)
    plain = vit_base.load(str(GOLDEN / "vit"))
    assert plain.mean == preprocess.HALF[0] and plain.fingerprint != base.fingerprint
    logits = features(base, want["images"]) @ base.head["kernel"] + base.head["bias"]
    np.testing.assert_allclose(logits, want["logits"], atol=1e-4)
    test, variables = images.smoke(12, 0), {"params": base.params, "peft": {}, "head": base.head}
    found = images.predictor(base, registry.parse("full"), peft.sites(base.model))(variables, test)
    assert found.shape == (12,) and set(found) <= {0, 1, 2}
    attention.draw(base, variables, test, found, tmp_path / "attention.png")
    with Image.open(tmp_path / "attention.png") as image:
        assert image.width > image.height > 200


def test_a_clip_gives_its_image_tower():
    base, want = vit_base.load(str(GOLDEN / "clip")), dict(np.load(GOLDEN / "clip" / "outputs.npz"))
    assert (base.mean, base.std) == preprocess.CLIP and base.head is None and base.classes == ()
    np.testing.assert_allclose(features(base, want["images"]), want["pooled_image"], atol=1e-4)


def test_a_language_model_is_no_base():
    with pytest.raises(ModelError, match="does not see images"):
        vit_base.load(str(GOLDEN / "bert"))
