"""Both families in all their variants: padding, causality, features, dtypes, layouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError, ModelError
from research.models import registry, stack, tie
from research.peft import method as peft
from research.peft import tree
from research.peft.lora import lora
from tests import tiny

VARIANTS = {
    "bert": tiny.ENCODER,
    "bert-nopooler": dataclasses.replace(tiny.ENCODER, pooler=False, activation="gelu_tanh"),
    "roberta": dataclasses.replace(
        tiny.ENCODER, family="roberta", type_vocab_size=1, position_offset=2, pooler=False, norm_eps=1e-5
    ),
    "llama": tiny.DECODER,
    "llama-tied": dataclasses.replace(tiny.DECODER, tie_embeddings=True),
    "llama3": dataclasses.replace(tiny.DECODER, rope_theta=5e5, rope_scaling=("llama3", 8.0, 1.0, 4.0, 16)),
    "mistral": dataclasses.replace(tiny.DECODER, family="mistral", sliding_window=3),
    "qwen2": dataclasses.replace(tiny.DECODER, family="qwen2", qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(tiny.DECODER, family="qwen3", qk_norm=True, head_dim=16),
}
DECODERS = [name for name, c in VARIANTS.items() if hasattr(c, "num_kv_heads")]
ENCODERS = [name for name in VARIANTS if name not in DECODERS]
variants = pytest.mark.parametrize("name", VARIANTS)
TEXT = np.random.default_rng(3).integers(1, tiny.VOCAB, tiny.SHORT).astype(np.int32)


@functools.cache
def compiled(name: str, method: str = "__call__"):
    model = registry.build(VARIANTS[name])
    return jax.jit(lambda p, tokens, mask: model.apply({"params": p}, tokens, mask, method=method))


def run(
    name: str, tokens: np.ndarray, mask: np.ndarray | None = None, method: str = "__call__", params=None
) -> np.ndarray:
    mask = np.ones_like(tokens) if mask is None else mask
    return np.asarray(compiled(name, method)(params or tiny.params(VARIANTS[name]), tokens, mask))


def padded() -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """The same text on the right, on the left and in the middle; pads are random tokens."""
    tokens = np.random.default_rng(4).integers(1, tiny.VOCAB, (3, tiny.LENGTH)).astype(np.int32)
    mask, places = np.zeros_like(tokens), []
    for row, start in enumerate((tiny.LENGTH - tiny.SHORT, 0, 2)):
        place = slice(start, start + tiny.SHORT)
        tokens[row, place], mask[row, place] = TEXT, 1
        places.append(place)
    return tokens, mask, places


@variants
def test_padding_changes_no_real_token(name):
    alone = run(name, TEXT[None])[0]
    tokens, mask, places = padded()
    hidden = run(name, tokens, mask)
    assert np.isfinite(hidden).all()
    for row, place in enumerate(places):
        np.testing.assert_allclose(hidden[row, place], alone, atol=1e-5)


@variants
def test_features_are_those_of_one_real_token(name):
    config = VARIANTS[name]
    alone, (tokens, mask, _) = run(name, TEXT[None])[0], padded()
    if name in DECODERS:
        expected = alone[-1]
    else:
        expected = alone[0]
        if config.pooler:
            pooler = tiny.params(config)["pooler"]
            expected = np.tanh(expected @ pooler["kernel"] + pooler["bias"])
    for row in run(name, tokens, mask, "features"):
        np.testing.assert_allclose(row, expected, atol=1e-5)


@variants
def test_who_sees_whom(name):
    """An encoder's first token sees the last; a decoder's none that follows, and no further back than its windows."""
    other = TEXT.copy()
    other[-1] = other[-1] % (tiny.VOCAB - 1) + 1
    one, two = run(name, TEXT[None])[0], run(name, other[None])[0]
    moved = np.abs(one - two).max(axis=1) > 1e-6
    assert moved.all() if name in ENCODERS else moved.tolist() == [False] * (tiny.SHORT - 1) + [True]
    if name in DECODERS:
        other = TEXT.copy()
        other[0] = other[0] % (tiny.VOCAB - 1) + 1
        moved = np.abs(one - run(name, other[None])[0]).max(axis=1) > 1e-6
        reach = tiny.SHORT if VARIANTS[name].sliding_window is None else 1 + VARIANTS[name].num_layers * 2
        assert moved.tolist() == [True] * reach + [False] * (tiny.SHORT - reach)


@variants
def test_every_parameter_changes_the_output(name):
    """Leaf by leaf and layer by layer: nothing of the base is unread."""
    config = VARIANTS[name]
    methods = ["features"] if name in ENCODERS else ["logits"]
    base = tiny.params(config)
    tokens = np.concatenate([TEXT, TEXT])[None]
    outputs = {m: run(name, tokens, method=m) for m in methods}
    for path, leaf in tree.paths(base).items():
        if path == "embed/types/embedding":
            leaf = leaf.at[0].add(1.0)
        layers = range(config.num_layers) if path.startswith("layers/") else [...]
        for layer in layers:
            step = np.random.default_rng(6).normal(size=leaf[layer].shape)
            moved = leaf.at[layer].add(jnp.asarray(step, leaf.dtype))
            params = tree.map_with_path(lambda p, x, path=path, moved=moved: moved if p == path else x, base)
            change = max(np.abs(run(name, tokens, method=m, params=params) - y).max() for m, y in outputs.items())
            # A bias of the keys moves all scores of a query alike, unless rotary embedding follows.
            invariant = path.endswith("attn/k/bias") and name in ENCODERS
            assert change < 1e-4 if invariant else change > 1e-4, (path, layer)


@variants
def test_unrolled_equals_scanned(name):
    config = dataclasses.replace(VARIANTS[name], scan=False)
    model = registry.build(config)
    shapes = tree.constant(peft.base(model)[0], 0)
    params = tiny.params(config)
    assert tree.constant(params, 0) == shapes and "layers_1" in params and "layers" not in params
    hidden = jax.jit(lambda p: model.apply({"params": p}, TEXT[None]))(params)
    np.testing.assert_allclose(hidden, run(name, TEXT[None]), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "qwen3"])
def test_bf16_compute_keeps_fp32_parameters(name):
    config = dataclasses.replace(VARIANTS[name], dtype="bfloat16")
    model = registry.build(config)
    assert {x.dtype for x in jax.tree.leaves(peft.base(model)[0])} == {jnp.dtype("float32")}
    hidden = jax.jit(lambda p: model.apply({"params": p}, TEXT[None]))(tiny.params(config))
    assert hidden.dtype == jnp.bfloat16
    exact = run(name, TEXT[None])
    error = np.abs(hidden.astype(jnp.float32) - exact).mean() / np.abs(exact).mean()
    assert 1e-4 < error < 0.05
    if name in DECODERS:
        logits = jax.eval_shape(lambda p: model.apply({"params": p}, TEXT[None], method="logits"), tiny.params(config))
        assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_bf16_parameters(name):
    config = dataclasses.replace(VARIANTS[name], dtype="bfloat16", param_dtype="bfloat16")
    shapes = peft.base(registry.build(config))[0]
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}
    hidden = registry.build(config).apply({"params": tiny.params(config)}, TEXT[None])
    assert hidden.dtype == jnp.bfloat16 and np.isfinite(hidden.astype(jnp.float32)).all()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_dropout_needs_an_rng(name):
    config = VARIANTS[name]
    if name == "bert":
        config = dataclasses.replace(config, dropout=0.3, attention_dropout=0.3)
    model, p = registry.build(config), tiny.params(VARIANTS[name])
    apply = jax.jit(lambda key: model.apply({"params": p}, TEXT[None], rngs={"dropout": key}))
    one, again, two = (apply(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.array_equal(one, two) == (name == "llama")
    np.testing.assert_array_equal(model.apply({"params": p}, TEXT[None]), model.apply({"params": p}, TEXT[None]))


def test_types_and_their_default():
    model, p = registry.build(tiny.ENCODER), tiny.params(tiny.ENCODER)
    apply = jax.jit(lambda types: model.apply({"params": p}, TEXT[None], None, types))
    zeros = np.zeros((1, tiny.SHORT), np.int32)
    np.testing.assert_allclose(apply(zeros), run("bert", TEXT[None]), atol=1e-6)
    assert np.abs(apply(zeros + 1) - apply(zeros)).max() > 1e-3


def test_tied_logits_are_products_with_the_table():
    p = tiny.params(VARIANTS["llama-tied"])
    hidden = run("llama-tied", TEXT[None])
    np.testing.assert_allclose(
        run("llama-tied", TEXT[None], method="logits"), hidden @ p["embed"]["tokens"]["embedding"].T, atol=1e-4
    )
    assert "lm_head" not in p and "lm_head" in tiny.params(VARIANTS["llama"])


def test_stack_and_unstack_are_inverse():
    base = {"layers": {"a": jnp.arange(24.0).reshape(12, 2)}, "norm": {"scale": jnp.ones(2)}}
    flat = stack.unstack(base)
    assert set(flat) == {"norm", *(f"layers_{i}" for i in range(12))}
    np.testing.assert_array_equal(flat["layers_10"]["a"], [20, 21])
    assert tiny.same(stack.stack(flat), base), "layers_10 comes after layers_9"
    assert stack.unstack(flat) is flat and stack.stack(base) is base


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ModelError, match="'roberta-base'"):
        registry.preset("roberta-bose")


def test_more_tokens_than_positions_are_refused():
    model = registry.build(dataclasses.replace(tiny.ENCODER, max_positions=14, position_offset=2))
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 12), jnp.int32))
    with pytest.raises(ModelError, match="13 tokens are more than the model's 12 positions"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 13), jnp.int32))


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ModelError, match="unknown remat policy 'dot'. Did you mean 'dots'"):
        registry.build(dataclasses.replace(tiny.ENCODER, remat="dot"))


def test_untying_changes_no_logit_and_makes_a_site():
    config = dataclasses.replace(tiny.DECODER, tie_embeddings=True)
    params, data = tiny.params(config), tiny.batch()
    with pytest.raises(FlagError, match="lm_head is this model's token table.*untie them first"):
        peft.init(lora(targets="lm_head"), jax.random.key(0), peft.sites(registry.build(config)))
    new, own = tie.untie(params, config)
    logits = [
        registry.build(c).apply({"params": p}, data["tokens"], data["mask"], method="logits")
        for p, c in ((params, config), (new, own))
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)
    added = peft.init(lora(targets="lm_head"), jax.random.key(0), peft.sites(registry.build(own)))
    assert set(added) == {"lm_head"}
    with pytest.raises(ModelError, match="not tied"):
        tie.untie(new, own)
