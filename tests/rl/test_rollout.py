"""Rollouts against teacher forcing, hand values of what they teach, and the gradient of the first step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.gpt2 import Gpt2Config
from research.models.llama import LlamaConfig
from research.models.registry import build
from research.rl import rollout, value
from research.rl.rollout import Sampled
from research.tasks import policy
from tests import tiny

CONFIG = dataclasses.replace(tiny.DECODER, num_layers=1)
# A token's place is added to it, so that one counted from the edge of a row would show; above, only distances matter.
ABSOLUTE = Gpt2Config(tiny.VOCAB, 32, 1, 4, 64, max_positions=16, dropout=0.0, attention_dropout=0.0)
MODEL, STOP, NEW = build(CONFIG), (3, 5, 7, 11), 6


def prompts(rows: int = 8, extra: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Padded on the left by different amounts, and by `extra` more; the pads are random tokens."""
    rng = np.random.default_rng(0)
    tokens, length = rng.integers(12, tiny.VOCAB, (rows, 4)), 4
    mask = np.arange(length) >= np.arange(rows)[:, None] % 3
    pad = np.full((rows, extra), 9)
    return np.concatenate([pad, tokens], axis=1).astype(np.int32), np.pad(mask, ((0, 0), (extra, 0))).astype(np.int32)


@functools.cache
def variables(config: LlamaConfig | Gpt2Config = CONFIG) -> dict:
    """Another policy than its reference, with a value head."""
    moved = tiny.noise(tiny.params(config), std=0.05)
    return {"params": moved, "head": {"kernel": jnp.full((config.hidden_size, 1), 0.1), "bias": jnp.ones(1)}}


@functools.cache
def sampled(extra: int = 0, temperature: float = 1.0, config: LlamaConfig | Gpt2Config = CONFIG) -> Sampled:
    draw = rollout.sampler(build(config), max_new=NEW, stop=STOP, temperature=temperature)
    out = draw(variables(config), {"params": tiny.params(config)}, *prompts(extra=extra), jax.random.key(1))
    return jax.tree.map(np.asarray, out)


@functools.cache
def forced(which: str) -> np.ndarray:
    """log p(token | before) of one row at a time, without padding, from the logits."""
    s, params = sampled(), {"policy": variables()["params"], "reference": tiny.params(CONFIG)}[which]
    apply = jax.jit(lambda t: jax.nn.log_softmax(MODEL.apply({"params": params}, t, method="logits")))
    out = np.zeros(s.tokens.shape, np.float32)
    for row in range(len(out)):
        real = np.flatnonzero(s.mask[row])
        whole = np.zeros((1, s.tokens.shape[1]), np.int32)
        whole[0, : len(real)] = s.tokens[row, real]
        logps = np.asarray(apply(whole))[0]
        for place in range(1, len(real)):
            if s.completion[row, real[place]]:
                out[row, real[place]] = logps[place - 1, whole[0, place]]
    return out


@pytest.mark.slow
def test_log_probabilities_are_those_of_teacher_forcing_and_of_the_sampler():
    s = sampled()
    np.testing.assert_allclose(s.old, forced("policy"), atol=2e-5)
    np.testing.assert_allclose(s.reference, forced("reference"), atol=2e-5)
    assert s.gap < 2e-5 and np.abs(s.old - s.reference).max() > 0.01


@pytest.mark.slow
def test_a_completion_ends_with_its_first_stop_token():
    s = sampled()
    assert s.ended.any() and not s.ended.all()
    for row, tokens in enumerate(s.tokens):
        length = s.completion[row].sum()
        made = tokens[4 : 4 + length]
        assert not s.completion[row, :4].any() and s.completion[row, 4 : 4 + length].all()
        assert not np.isin(made[:-1], STOP).any() and np.isin(made[-1], STOP) == s.ended[row]
        assert s.ended[row] or length == NEW
    written = rollout.texts(s, lambda ids: " ".join(map(str, ids)))
    assert written[0].split() == [str(t) for t in s.tokens[0, 4:][s.completion[0, 4:] > 0]]


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, ABSOLUTE], ids=lambda config: config.family)
def test_padding_changes_no_number(config):
    s, more = sampled(config=config), sampled(extra=5, config=config)
    assert np.array_equal(s.tokens[:, 4:], more.tokens[:, 9:])
    for name in ("old", "reference", "values"):
        np.testing.assert_allclose(getattr(more, name)[:, 9:], getattr(s, name)[:, 4:], atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_a_policy_that_is_its_reference_is_at_no_distance():
    draw = rollout.sampler(MODEL, max_new=NEW, stop=STOP)
    same = {"params": tiny.params(CONFIG)}
    s = draw(same, same, *prompts(), jax.random.key(1))
    assert np.array_equal(s.old, s.reference) and not np.any(s.values)


def hand() -> Sampled:
    """Four rows of three completion tokens, the last one of row 1 missing; two prompts of two."""
    completion = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]], np.int32)
    rng = np.random.default_rng(2)
    old, reference, values = (rng.normal(size=(4, 4)).astype(np.float32) * completion for _ in range(3))
    ended = np.array([True, True, False, True])
    ones = np.ones((4, 4), np.int32)
    return Sampled(ones, ones, completion, old, reference, values, ended, np.zeros((), np.float32))


SCORE = jnp.asarray([1.0, 0.0, 3.0, 2.0])


@pytest.mark.slow
def test_what_rows_are_worth_by_hand():
    s = hand()
    rows, stats = rollout.credit(policy.variant("grpo"), s, SCORE, 2, 0.3, missing_eos=0.5)
    half, third = 0.5 / (np.sqrt(0.5) + 1e-4), 0.25 / (np.sqrt(0.125) + 1e-4)  # 3 - 0.5 against 2
    np.testing.assert_allclose(rows["advantages"][:, 1], [half, -half, third, -third], rtol=1e-5)
    assert not np.any(np.asarray(rows["advantages"]) * (1 - s.completion)) and np.all(rows["weight"] == 1)
    k1 = (s.old - s.reference).sum(axis=1)
    assert float(stats["reward"]) == 1.5 and float(stats["terminated"]) == 0.75
    np.testing.assert_allclose(stats["kl_sequence"], k1.mean(), rtol=1e-5)

    rows, _ = rollout.credit(policy.variant("rloo"), s, SCORE, 2, 0.3, missing_eos=0.5)
    worth = np.array([1.0, 0.0, 2.5, 2.0]) - 0.3 * k1
    np.testing.assert_allclose(rows["advantages"][:, 1], worth - worth[[1, 0, 3, 2]], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ppos_returns_are_a_loop_over_tokens():
    s, coef = hand(), 0.3
    rows, _ = rollout.credit(policy.variant("ppo"), s, SCORE, 2, coef, missing_eos=0.5, gamma=0.9, lam=0.8)
    worth, raw = [1.0, 0.0, 2.5, 2.0], np.zeros((4, 4))
    for row in range(4):
        places = np.flatnonzero(s.completion[row])
        gain = after = 0.0
        for place in places[::-1]:
            reward = -coef * (s.old - s.reference)[row, place] + (worth[row] if place == places[-1] else 0.0)
            gain = reward + 0.9 * after - s.values[row, place] + 0.9 * 0.8 * gain
            after, raw[row, place] = s.values[row, place], gain
    np.testing.assert_allclose(rows["returns"], raw + s.values, atol=1e-5)
    real = s.completion > 0
    white = (raw - raw[real].mean()) / np.sqrt(raw[real].var() + 1e-8)
    np.testing.assert_allclose(rows["advantages"], np.where(real, white, 0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo", "rloo"])
def test_a_row_without_a_score_teaches_nothing_and_changes_no_other(name: str):
    s, holed = hand(), SCORE.at[3].set(jnp.nan)
    rows, stats = rollout.credit(policy.variant(name), s, holed, 2)
    assert np.isfinite(rows["advantages"]).all() and list(rows["weight"]) == [1, 1, 1, 0]
    assert float(stats["unscored"]) == 0.25 and float(stats["reward"]) == pytest.approx(4 / 3)
    if name != "ppo":  # whose whitening is over all rows
        whole, _ = rollout.credit(policy.variant(name), s, SCORE, 2)
        assert np.array_equal(rows["advantages"][:2], whole["advantages"][:2]) and not np.any(rows["advantages"][3])


@pytest.mark.slow
def test_dynamic_sampling_leaves_out_groups_of_one_opinion():
    rows, stats = rollout.credit(policy.variant("dapo"), hand(), SCORE.at[1].set(1.0), 2, dynamic=True)
    assert list(rows["weight"]) == [0, 0, 1, 1] and float(stats["frac_reward_zero_std"]) == 0.5


@functools.cache
def learning(name: str) -> tuple:
    """(loss, variables with a rollout, the batch of all its rows in a first step)."""
    v = policy.variant(name)
    rows, stats = rollout.credit(v, sampled(), jnp.arange(8.0) % 3, 4)
    rows["old"] = rows["old"] + 1e-3 * rows["completion"]  # as if rounded: a first step must not see it
    given = variables() | {"rollout": {"rows": rows, "stats": stats}}
    batch = {"rows": jnp.arange(8), "weight": jnp.ones(8), "first": jnp.ones(8)}
    return jax.jit(rollout.loss(MODEL, v)), given, batch


@pytest.mark.slow
def test_the_first_step_has_ratio_one_and_later_ones_their_own():
    loss, given, batch = learning("grpo")
    mean = lambda out, name: float(out.metrics[name][0] / out.metrics[name][1])  # noqa: E731
    first, later = loss(given, batch, None), loss(given, batch | {"first": jnp.zeros(8)}, None)
    assert mean(first, "ratio_mean") == 1 and mean(first, "clip_fraction") == 0 and mean(first, "approx_kl") == 0
    assert mean(later, "ratio_mean") == pytest.approx(np.exp(-1e-3), abs=1e-5)
    assert mean(first, "reward") == float(given["rollout"]["stats"]["reward"])


@pytest.mark.slow
def test_the_first_gradient_is_that_of_reinforce():
    """d/dw of ratio * A at ratio 1 is A d log p / dw; the loss itself is -mean A, about 0, which is no standstill."""
    loss, given, batch = learning("grpo")
    s, a = sampled(), np.asarray(given["rollout"]["rows"]["advantages"])

    def reinforce(params):
        hidden = MODEL.apply({"params": params}, s.tokens, s.mask, method="logits")
        picked = jnp.take_along_axis(jax.nn.log_softmax(hidden[:, :-1]), s.tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.mean(jnp.sum(picked * a[:, 1:] * s.completion[:, 1:], axis=1) / s.completion.sum(axis=1))

    found = jax.jit(jax.grad(lambda p: loss(given | {"params": p}, batch, None).mean()))(given["params"])
    wanted = jax.jit(jax.grad(reinforce))(given["params"])
    tiny.close(found, wanted, atol=1e-5)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found)) > 1e-2


@pytest.mark.slow
def test_rows_of_parts_add_up_to_the_batch():
    loss, given, batch = learning("grpo")
    whole = loss(given, batch, None)
    parts = [loss(given, {k: x[part] for k, x in batch.items()}, None) for part in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(sum(p.sum for p in parts), whole.sum, atol=1e-5)
    assert float(sum(p.weight for p in parts)) == float(whole.weight)


@pytest.mark.slow
def test_a_value_knows_only_what_came_before():
    s = sampled()
    score = jax.jit(lambda t: value.values(variables()["head"], MODEL.apply({"params": variables()["params"]}, t)))
    other = s.tokens.copy()
    other[:, 7] = (other[:, 7] + 1) % tiny.VOCAB
    before, after = np.asarray(score(s.tokens)), np.asarray(score(other))
    assert np.array_equal(before[:, :8], after[:, :8]) and np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-4
    assert not np.any(before[:, 0])


def test_the_empty_rollout_has_the_shapes_of_a_full_one():
    for name in ("grpo", "ppo"):
        v, s = policy.variant(name), hand()
        full = jax.eval_shape(lambda v=v, s=s: rollout.credit(v, jax.tree.map(jnp.asarray, s), SCORE, 2))
        none = rollout.empty(v, 4, 4, 2, 0.1)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), {"rows": full[0], "stats": full[1]})
        assert jax.tree.map(lambda x: (x.shape, x.dtype), none) == shapes
        assert float(none["stats"]["kl_coef"]) == pytest.approx(0.1)


def test_a_first_step_comes_once_a_rollout():
    batch = rollout.row_batches(lambda step: {"rows": np.arange(4)[None]}, 3)
    assert [float(batch(step)["first"].min()) for step in range(7)] == [1, 0, 0, 1, 0, 0, 1]
