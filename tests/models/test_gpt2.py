"""GPT-2 beyond what tests/convert checks against transformers: its files, its positions, its cache."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research.convert.config import config_from_hf
from research.convert.export import export_hf
from research.convert.load import load
from research.errors import ModelError
from research.generate.decode import generate
from research.models import registry, tie
from research.models.gpt2 import PRESETS, Gpt2Config
from research.peft import method as peft
from research.peft import tree
from tests import tiny
from tests.convert.test_hf import GOLDEN, copy, rewrite  # noqa: F401  (a fixture)
from tests.generate import test_decode as decode

CONFIG = Gpt2Config(tiny.VOCAB, 32, 2, 4, 56, max_positions=24, dropout=0.0, attention_dropout=0.0)
TEXT = np.random.default_rng(3).integers(1, tiny.VOCAB, tiny.SHORT).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def family():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CONFIGS, "gpt2", CONFIG)
        yield


@functools.cache
def compiled(config: Gpt2Config = CONFIG):
    model = registry.build(config)
    return jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs, method="logits"))


def logits(*inputs, params=None) -> np.ndarray:
    return np.asarray(compiled()(tiny.params(CONFIG) if params is None else params, *inputs))


def padded() -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """The text on the right, on the left and in the middle of random tokens."""
    tokens = np.random.default_rng(4).integers(1, tiny.VOCAB, (3, tiny.LENGTH)).astype(np.int32)
    mask, places = np.zeros_like(tokens), []
    for row, start in enumerate((tiny.LENGTH - tiny.SHORT, 0, 2)):
        places.append(slice(start, start + tiny.SHORT))
        tokens[row, places[-1]], mask[row, places[-1]] = TEXT, 1
    return tokens, mask, places


def test_padding_changes_no_real_token_and_none_sees_what_follows():
    alone, (tokens, mask, places) = logits(TEXT[None])[0], padded()
    for row, place in zip(logits(tokens, mask), places, strict=True):
        np.testing.assert_allclose(row[place], alone, atol=1e-5)
    other = TEXT.copy()
    other[-1] = other[-1] % (tiny.VOCAB - 1) + 1
    moved = np.abs(alone - logits(other[None])[0]).max(axis=1) > 1e-6
    assert moved.tolist() == [False] * (tiny.SHORT - 1) + [True]


@pytest.mark.slow
def test_documents_that_share_a_row_are_computed_as_if_alone():
    rng, sizes = np.random.default_rng(5), (3, 5, 2)
    texts = [rng.integers(1, tiny.VOCAB, n).astype(np.int32) for n in sizes]
    row = np.pad(np.concatenate(texts), (0, 2))[None]
    segments = np.pad(np.repeat([1, 2, 3], sizes), (0, 2))[None].astype(np.int32)
    found = compiled()(tiny.params(CONFIG), row, (segments > 0).astype(np.int32), segments)[0]
    for start, text in zip(np.cumsum([0, *sizes]), texts, strict=False):
        np.testing.assert_allclose(found[start : start + len(text)], logits(text[None])[0], atol=1e-5)


@pytest.mark.slow
def test_every_parameter_changes_the_output():
    """Leaf by leaf and layer by layer, but for a key's bias, which moves all scores of a query alike."""
    base, tokens = tiny.params(CONFIG), np.resize(TEXT, 24)[None]  # a token for every position
    before = logits(tokens)
    for path, leaf in tree.paths(base).items():
        for layer in range(CONFIG.num_layers) if path.startswith("layers/") else [...]:
            step = jnp.asarray(np.random.default_rng(6).normal(size=leaf[layer].shape), leaf.dtype)
            moved = tree.map_with_path(
                lambda p, x, path=path, layer=layer, step=step: x.at[layer].add(step) if p == path else x, base
            )
            change = np.abs(logits(tokens, params=moved) - before).max()
            assert (change > 1e-4) != path.endswith("attn/k/bias"), (path, layer, change)


@pytest.mark.slow
def test_unrolled_equals_scanned_and_untied_equals_tied():
    unrolled = dataclasses.replace(CONFIG, scan=False)
    np.testing.assert_allclose(compiled(unrolled)(tiny.params(unrolled), TEXT[None]), logits(TEXT[None]), atol=1e-5)
    params, own = tie.untie(tiny.params(CONFIG), CONFIG)
    np.testing.assert_allclose(compiled(own)(params, TEXT[None]), logits(TEXT[None]), atol=1e-5)


@pytest.mark.slow
def test_dropout_is_in_the_embeddings_and_both_sublayers():
    tokens, params = TEXT[None], tiny.params(CONFIG)
    for rates in ((0.3, 0.0), (0.0, 0.3)):
        model = registry.build(dataclasses.replace(CONFIG, dropout=rates[0], attention_dropout=rates[1]))
        apply = jax.jit(lambda rng, model=model: model.apply({"params": params}, tokens, rngs={"dropout": rng}))
        one, again, two = (apply(jax.random.key(k)) for k in (0, 0, 1))
        np.testing.assert_array_equal(one, again)
        assert np.abs(one - two).max() > 1e-3
        np.testing.assert_array_equal(compiled(model.config)(params, tokens), logits(tokens))


def test_more_tokens_than_positions_are_refused():
    model = registry.build(CONFIG)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 24), jnp.int32))
    with pytest.raises(ModelError, match="25 tokens are more than the model's 24 positions"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 25), jnp.int32))
    case = tiny.case("prompt:length=4", "gpt2")
    with pytest.raises(ModelError, match="25 tokens are more"):
        case.forward(case.variables, {"tokens": np.ones((1, 21), np.int32), "mask": np.ones((1, 21), np.int32)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [decode.CHAIN, "bitfit+lora:targets=all", "vpt:length=2", "ladder", "ptuning_v2:length=4"]
)
def test_cached_decoding_is_teacher_forcing(spec: str):
    full, cached = decode.forced(spec, "gpt2")
    assert np.abs(full).max() > 0.1
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_decoding_reaches_the_last_position():
    """Slots that only pad take no position: 6 real tokens of 8 slots, and 18 more, are the table's 24."""
    model, variables = registry.build(CONFIG), {"params": tiny.params(CONFIG)}
    tokens, mask = np.tile(TEXT, (2, 1)), np.ones((2, 8), np.int32)
    mask[:, :2] = 0
    out = jax.jit(lambda t, m: generate(model, variables, t, m, jax.random.key(0), max_new=18))(tokens, mask)
    scores = np.asarray(jax.nn.log_softmax(logits(np.concatenate([tokens[:, 2:], out.tokens], axis=1))))
    expected = np.take_along_axis(scores[:, 5:-1], np.asarray(out.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)


def test_the_hubs_bare_names_buffers_and_redundant_head_are_understood(copy, tmp_path):  # noqa: F811
    folder, want = copy("gpt2"), load(str(GOLDEN / "gpt2")).fingerprint

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()
        tensors["h.0.attn.bias"], tensors["h.1.attn.masked_bias"] = np.ones((1, 1, 40, 40), bool), np.zeros(1)

    rewrite(folder, bare)
    assert load(str(folder)).fingerprint == want
    rewrite(folder, lambda tensors: tensors.__setitem__("lm_head.weight", tensors["lm_head.weight"] + 1))
    with pytest.raises(ModelError, match="config ties lm_head to the embedding, but lm_head.weight differs"):
        load(str(folder))


def test_a_fused_projection_of_another_shape_names_itself(copy):  # noqa: F811
    folder = copy("gpt2")
    rewrite(folder, lambda tensors: tensors.__setitem__("transformer.h.1.attn.c_attn.weight", np.zeros((96, 32))))
    with pytest.raises(ModelError, match=r"c_attn.weight has shape \[96, 32\], the config wants \[32, 96\]"):
        load(str(folder))


@pytest.mark.slow
def test_an_untied_model_and_a_classifier_go_out_and_come_back(tmp_path):
    base = load(str(GOLDEN / "gpt2"), untie=True)
    assert load(str(export_hf(tmp_path / "a", base.config, base.params))).fingerprint == base.fingerprint
    tied = load(str(GOLDEN / "gpt2"))
    folder = export_hf(tmp_path / "b", tied.config, tied.params, head={"kernel": jnp.ones((32, 3))})
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2ForSequenceClassification"]
    assert load_file(folder / "model.safetensors")["score.weight"].shape == (3, 32)
    assert load(str(folder)).fingerprint == tied.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "tanh"}, "activation_function 'tanh'"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"embd_pdrop": 0.2}, "embd_pdrop 0.2 beside resid_pdrop 0.1"),
        ({"n_embd": None, "n_inner": None}, "makes no sense"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict, message: str):
    with pytest.raises(ModelError, match=message):
        config_from_hf(json.loads((GOLDEN / "gpt2" / "config.json").read_text()) | change)


@pytest.mark.parametrize(
    ("name", "count"), [("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200), ("gpt3", 174_604_259_328)]
)
def test_sizes_are_the_papers(name: str, count: int):
    assert tree.count(peft.base(registry.build(PRESETS[name]))[0]) == count
