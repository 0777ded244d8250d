"""BLOOM beyond what tests/convert checks against transformers: distances, documents, its cache."""

import functools
import json

import jax
import numpy as np
import pytest

from research.convert import names
from research.convert.config import config_from_hf
from research.errors import ModelError
from research.models import registry
from research.models.bloom import PRESETS, BloomConfig
from research.peft import method as peft
from research.peft import tree
from tests import tiny
from tests.convert.test_hf import GOLDEN
from tests.generate import test_decode as decode

CONFIG = BloomConfig(tiny.VOCAB, 24, 2, 6, 56)  # six heads: slopes of a number that is no power of two
TEXT = np.random.default_rng(3).integers(1, tiny.VOCAB, tiny.SHORT).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def family():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CONFIGS, "bloom", CONFIG)
        yield


@functools.cache
def compiled():
    model = registry.build(CONFIG)
    return jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs, method="logits"))


def logits(*inputs) -> np.ndarray:
    return np.asarray(compiled()(tiny.params(CONFIG), *inputs))


@pytest.mark.slow
def test_padding_and_neighbouring_documents_change_no_token():
    alone = logits(TEXT[None])[0]
    tokens = np.random.default_rng(4).integers(1, tiny.VOCAB, (3, tiny.LENGTH)).astype(np.int32)
    mask, starts = np.zeros_like(tokens), (0, 2, tiny.LENGTH - tiny.SHORT)
    for row, start in enumerate(starts):
        tokens[row, start : start + tiny.SHORT], mask[row, start : start + tiny.SHORT] = TEXT, 1
    for row, start in zip(logits(tokens, mask), starts, strict=True):
        np.testing.assert_allclose(row[start : start + tiny.SHORT], alone, atol=1e-5)
    segments = np.where(mask == 1, 1, 2).astype(np.int32)[[0, 2]]  # another document behind it, and before it
    for row, start in zip(logits(tokens[[0, 2]], np.ones_like(segments), segments), (0, starts[2]), strict=True):
        np.testing.assert_allclose(row[start : start + tiny.SHORT], alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [decode.CHAIN, "vpt:length=2", "ladder:heads=3"])
def test_cached_decoding_is_teacher_forcing(spec: str):
    full, cached = decode.forced(spec, "bloom")
    assert np.abs(full).max() > 0.1
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "count"), [("bloom-560m", 559_214_592), ("bloom-1b4-zh", 1_303_111_680), ("bloom", 176_247_271_424)]
)
def test_sizes_are_the_published_ones(name: str, count: int):
    assert tree.count(peft.base(registry.build(PRESETS[name]))[0]) == count


def test_a_fused_kernel_holds_query_key_and_value_of_a_head_side_by_side():
    kernel = np.arange(2 * 3 * 24).reshape(2, 3 * 24)
    parts = [names.split(CONFIG, kernel, part) for part in range(3)]
    np.testing.assert_array_equal(parts[1][:, :4], kernel[:, 4:8])  # the first head's key follows its query
    np.testing.assert_array_equal(parts[0][:, 4:8], kernel[:, 12:16])
    np.testing.assert_array_equal(names.fuse(CONFIG, parts), kernel)


def test_config_files_old_and_refused():
    config = json.loads((GOLDEN / "bloom" / "config.json").read_text())
    old = {k: v for k, v in config.items() if k != "hidden_size"} | {"n_embed": config["hidden_size"]}
    assert config_from_hf(old) == config_from_hf(config)
    with pytest.raises(ModelError, match="apply_residual_connection_post_layernorm"):
        config_from_hf(config | {"apply_residual_connection_post_layernorm": True})
    with pytest.raises(ModelError, match="bloom model has no 'n_embed'"):
        config_from_hf({k: v for k, v in config.items() if k != "hidden_size"})
