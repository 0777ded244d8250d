"""Bradley-Terry's golden numbers, and what the glue to a model must hold: real EOS, masks, references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError
from research.models.registry import build
from research.tasks import alignment, preference, reward
from research.tasks.preference import Options
from tests import tiny

WIN, LOSE = jnp.asarray([1.2, -0.3, 0.8]), jnp.asarray([0.4, 0.1, 0.8])


def test_golden_bradley_terry():
    plain = reward.bradley_terry(WIN, LOSE)
    np.testing.assert_allclose(plain.mean(), 0.659087700, rtol=1e-6)
    np.testing.assert_allclose(reward.bradley_terry(WIN, LOSE, jnp.asarray([0.5, 0, 1])).mean(), 0.926877395, rtol=1e-6)
    np.testing.assert_allclose(reward.bradley_terry(WIN, LOSE, centre=0.01).mean(), 0.676287700, rtol=1e-6)
    assert [float(x) for x in plain.metrics["rewards/accuracies"]] == [1, 3], "a tie is wrong"
    np.testing.assert_allclose(reward.bradley_terry(WIN * 0, LOSE * 0).mean(), np.log(2), rtol=1e-6)


def test_soft_targets():
    target = jnp.asarray([1.0, 0.2, 0.5])
    swapped = reward.bradley_terry(LOSE, WIN, target=1 - target)
    out = reward.bradley_terry(WIN, LOSE, target=target)
    np.testing.assert_allclose(out.sum, swapped.sum, rtol=1e-6)
    assert [float(x) for x in out.metrics["rewards/accuracies"]] == [2, 2]


def test_normalised_head():
    head, x = (
        {"kernel": jnp.asarray([[2.0], [-1.0]]), "bias": jnp.ones(1)},
        np.random.default_rng(0).normal(size=(9, 2)),
    )
    score = lambda h: x @ np.asarray(h["kernel"])[:, 0] + np.asarray(h["bias"])  # noqa: E731
    after = score(reward.normalise(head, score(head)))
    np.testing.assert_allclose([after.mean(), after.std()], [0, 1], atol=1e-6)


@functools.cache
def setting() -> tuple:
    """A tiny decoder; rows of a prompt of 3 tokens and completions of unequal lengths, padded on the right."""
    data = {k: jnp.asarray(v) for k, v in tiny.batch().items()}
    side = {"tokens": data["tokens"], "mask": data["mask"]}
    side["completion"] = data["mask"] * (jnp.arange(tiny.LENGTH) >= 3)
    other = side | {"tokens": side["tokens"].at[:, 4].add(1).at[0, 4].add(-1)}  # row 0 is the same on both sides
    return build(tiny.DECODER), {"params": tiny.params(tiny.DECODER)}, side, other


@functools.cache
def scored() -> tuple:
    model, variables, side, _ = setting()
    whole = jax.jit(lambda b: alignment.sequence_logprobs(model, variables, b))(side)
    return whole, jax.jit(lambda b: alignment.sequence_logprobs(model, variables, b, chunk=4))(side)


@pytest.mark.slow
def test_sequence_logprobs():
    model, variables, side, _ = setting()
    whole, chunked = scored()
    tiny.close(whole, chunked)
    z = np.asarray(model.apply(variables, side["tokens"], side["mask"], method="logits"), np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    for row, length in enumerate(np.asarray(side["mask"]).sum(1)):
        for t in range(tiny.LENGTH):
            counted = 3 <= t < length
            want = logp[row, t - 1, side["tokens"][row, t]] if counted else 0
            assert float(whole.logps[row, t]) == pytest.approx(want, abs=1e-4) and whole.mask[row, t] == counted
    np.testing.assert_allclose(whole.entropy[0, 3], -(np.exp(logp[0, 2]) @ logp[0, 2]), atol=1e-4)


@pytest.mark.slow
def test_references_agree_and_a_fresh_policy_starts_at_log_two():
    model, variables, side, other = setting()
    pair = {"chosen": side, "rejected": other}
    losses = {}
    variables = variables | {"reference": {"params": variables["params"]}}
    for source in ("base", "initial_adapter"):
        losses[source] = jax.jit(alignment.preference_loss(model, "dpo", reference=source))(variables, pair, None)
    known = [preference.completion(*alignment.sequence_logprobs(model, variables, s)[:2]).logps for s in (side, other)]
    pair |= {"reference_chosen": known[0], "reference_rejected": known[1]}
    losses["batch"] = jax.jit(alignment.preference_loss(model, "dpo", reference="batch"))(variables, pair, None)
    for source, out in losses.items():
        np.testing.assert_allclose(out.mean(), np.log(2), atol=1e-5, err_msg=source)
        assert float(out.weight) == 3 and float(out.metrics["skipped"][0]) == 1, "equal sides are skipped and counted"
    exact = losses["base"].metrics
    assert float(exact["rewards/margins"][0]) == 0, "one program, one set of numbers"


@pytest.mark.slow
def test_kto_through_a_model():
    model, variables, side, other = setting()
    batch = side | {"desirable": jnp.asarray([1, 0, 1, 0]), "mismatched": other}
    out = jax.jit(alignment.kto_loss(model, Options()))(variables, batch, None)
    assert float(out.mean()) == pytest.approx(0.5) and float(out.metrics["kl"][0]) == 0


@pytest.mark.slow
def test_scores_sit_on_the_last_real_token():
    model, variables, side, _ = setting()
    variables = variables | {"head": reward.init_head(jax.random.key(0), tiny.DECODER.hidden_size)}
    score = jax.jit(lambda b: reward.scores(model, variables, b))
    right = score(side)
    lengths = np.asarray(side["mask"]).sum(1)
    turned = lambda x: np.stack([np.roll(r, -m) for r, m in zip(np.asarray(x), lengths, strict=True)])  # noqa: E731
    left = {k: turned(side[k]) for k in ("tokens", "mask")}
    np.testing.assert_allclose(score(left), right, atol=1e-4)
    changed = side["tokens"].at[np.arange(tiny.ROWS), lengths - 1].set(1)
    assert (np.abs(score(side | {"tokens": changed}) - right) > 1e-3).all()


def test_refuses():
    model, variables, *_ = setting()
    with pytest.raises(FlagError, match="Did you mean 'dpo'"):
        alignment.preference_loss(model, "dpoo")
    with pytest.raises(FlagError, match="Did you mean 'base'"):
        alignment.kto_loss(model, reference="bas")
    with pytest.raises(FlagError, match="collection 'reference'"):
        alignment.reference_variables(variables, "initial_adapter")
