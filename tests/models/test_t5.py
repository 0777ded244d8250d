"""T5: buckets by a loop, decoding with a cache, methods on both stacks and on cross-attention, and the loss."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.generate import cache as caches
from research.generate.decode import generate
from research.models import stack
from research.models.registry import build
from research.models.t5 import T5Config, bucket
from research.peft import method as peft
from research.peft import registry, tree
from research.tasks import seq2seq
from tests import tiny

TINY = T5Config(tiny.VOCAB, 32, 2, 3, 4, 8, 48, buckets=8, max_distance=20)
MANY = "prefix:length=2+prompt:length=2+lora:targets=all+ia3+houlsby"
FIRST = {"gated": False, "tie_embeddings": True, "scale_outputs": True}  # T5 before 1.1
ROOM = 3


@functools.cache
def params(**changes):
    base = tiny.fill(peft.base(build(dataclasses.replace(TINY, **changes | {"scan": True})))[0])
    return base if changes.get("scan", True) else stack.unstack(base)


def point(spec: str, **changes):
    """(model, variables at a random point, realised)."""
    model, method = build(dataclasses.replace(TINY, **changes)), registry.parse(spec)
    sites = peft.sites(model)
    added = tiny.noise(peft.init(method, jax.random.key(1), sites))
    return model, peft.realised(method, {"params": params(**changes), "peft": added}, sites)


def sources():
    """Padded on the left by different amounts; the pads are random tokens."""
    rng = np.random.default_rng(5)
    mask = (np.arange(6) >= np.arange(3)[:, None] * 2).astype(np.int32)
    return rng.integers(1, tiny.VOCAB, (3, 6)).astype(np.int32), mask


@pytest.mark.parametrize("two_sided", [True, False])
def test_buckets(two_sided):
    """The paper's rule, one distance at a time."""

    def one(d):
        count, first = (4, 4 * (d > 0)) if two_sided else (8, 0)
        d = abs(d) if two_sided else max(-d, 0)
        if d < count // 2:
            return first + d
        far = math.log(d / (count // 2)) / math.log(20 / (count // 2)) * (count - count // 2)
        return first + min(count - 1, count // 2 + int(far))

    distances = np.arange(-40, 41)
    found = bucket(jnp.asarray(distances), 8, 20, two_sided)
    np.testing.assert_array_equal(found, [one(int(d)) for d in distances])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"scan": False}, {"gated": False, "tie_embeddings": True, "scale_outputs": True}], ids=str
)
def test_cached_decoding_is_teacher_forcing(changes):
    model, v = point(MANY, **changes)
    tokens, mask = sources()
    targets = np.random.default_rng(6).integers(1, tiny.VOCAB, (3, ROOM + 1)).astype(np.int32)
    targets[:, 0] = TINY.start_token_id

    @jax.jit
    def both(v, tokens, mask, targets):
        full = model.apply(v, tokens, mask, targets, method="logits")
        logits, cache = caches.prefill(model, v, tokens, mask, ROOM)
        found = [logits]
        for i in range(ROOM):
            logits, cache = caches.step(model, v, cache, targets[:, i + 1], ROOM - i)
            found.append(logits)
        return full, jnp.stack(found, axis=1)

    full, cached = both(v, tokens, mask, targets)
    assert np.abs(full).max() > 0.1
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)
    moved = both(v, tokens[:, 1:][1:], mask[:, 1:][1:], targets[1:])[0]  # one pad less on the left
    np.testing.assert_allclose(moved, full[1:], atol=1e-4)


@pytest.mark.slow
def test_generates():
    model, v = point("lora")
    out = generate(model, v, *sources(), jax.random.key(0), max_new=ROOM)
    given = jnp.pad(out.tokens[:, :-1], ((0, 0), (1, 0)), constant_values=TINY.start_token_id)
    z = model.apply(v, *sources(), given, method="logits")
    np.testing.assert_array_equal(out.tokens, jnp.argmax(z, -1))


def test_sites_of_both_stacks():
    sites = peft.sites(build(TINY))
    found = {p for p, s in sites.items() if s.kind == "attention"}
    assert found == {"encoder/layers/attn/kv", "decoder/layers/attn/kv", "decoder/layers/cross_attn/kv"}
    assert [p for p, s in sites.items() if s.kind == "embed"] == ["embed/prompt"]
    added = peft.init(registry.parse("lora:rank=2,layers=2"), jax.random.key(0), sites)
    nodes = tree.paths(added, is_leaf=peft.is_node)
    assert nodes["decoder/layers/attn/q/lora"].on.tolist() == [False, False, True]
    assert nodes["encoder/layers/attn/q/lora"].on.tolist() == [False, False]


def test_cross_attention_trains_only_that():
    v = {"params": params(), "peft": {}}
    mask = tree.paths(peft.mask(registry.parse("cross_attention"), v))
    trained = {path for path, m in mask.items() if m is not False}
    assert trained == {f"params/decoder/layers/cross_attn/{x}/kernel" for x in "qkvo"}
    last = tree.paths(peft.mask(registry.parse("last_layers:count=1"), v))
    assert np.ravel(last["params/decoder/layers/attn/q/kernel"]).tolist() == [False, False, True]
    assert np.ravel(last["params/encoder/layers/attn/q/kernel"]).tolist() == [False, True]


@pytest.mark.slow
def test_loss_is_the_mean_over_target_tokens():
    model, v = point("lora")
    tokens, mask = sources()
    rng = np.random.default_rng(1)
    targets, lengths = rng.integers(1, tiny.VOCAB, (3, 4)).astype(np.int32), np.array([4, 2, 3])
    batch = {"tokens": tokens, "mask": mask, "targets": targets}
    batch["target_mask"] = (np.arange(4) < lengths[:, None]).astype(np.int32)
    found = jax.jit(seq2seq.loss(model))(v, batch, None)
    nats = 0.0
    for row, length in enumerate(lengths):
        read = np.concatenate([[TINY.start_token_id], targets[row, : length - 1]])[None]
        z = model.apply(v, tokens[row : row + 1], mask[row : row + 1], read.astype(np.int32), method="logits")
        nats -= np.take_along_axis(np.asarray(jax.nn.log_softmax(z))[0], targets[row, :length, None], -1).sum()
    np.testing.assert_allclose([found.sum, found.weight], [nats, lengths.sum()], rtol=1e-5)


@pytest.mark.slow
def test_dropout_only_in_training():
    model, v = point("lora")
    tokens, mask = sources()
    quiet = model.apply(v, tokens, mask)
    np.testing.assert_array_equal(quiet, model.apply(v, tokens, mask))
    assert np.abs(quiet - model.apply(v, tokens, mask, rngs={"dropout": jax.random.key(0)})).max() > 1e-3
