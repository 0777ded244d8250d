"""Beam search against all continuations there are."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError
from research.generate.beams import search
from research.generate.decode import generate
from research.generate.sampling import GREEDY
from research.peft import method as peft
from research.tasks.loss import model_variables
from tests import tiny
from tests.generate.test_decode import CHAIN, prompts

pytestmark = pytest.mark.slow
STOP = 7


@functools.cache
def everything():
    """Log-probabilities of both tokens of every continuation by two: [B, V] and [B, V, V]."""
    case = tiny.case(CHAIN, "decoder")
    v = peft.realised(case.method, case.point, case.sites)
    tokens, mask = prompts()
    pairs = np.array(list(itertools.product(range(tiny.VOCAB), repeat=2)), np.int32)

    @jax.jit
    def scores(tokens, mask):
        rows = jnp.concatenate([jnp.broadcast_to(tokens, (len(pairs), len(tokens))), pairs], axis=1)
        real = jnp.concatenate([jnp.broadcast_to(mask, (len(pairs), len(mask))), jnp.ones_like(pairs)], axis=1)
        logp = jax.nn.log_softmax(case.model.apply(model_variables(v), rows, real, method="logits")[:, -3:-1])
        return jnp.take_along_axis(logp, pairs[..., None], axis=-1)[..., 0]

    found = np.stack([scores(t, m) for t, m in zip(tokens, mask, strict=True)])
    found = found.reshape(len(tokens), tiny.VOCAB, tiny.VOCAB, 2)
    return found[:, :, 0, 0], found[..., 1]


def found(beams: int, **options):
    case = tiny.case(CHAIN, "decoder")
    v = peft.realised(case.method, case.point, case.sites)
    return search(case.model, v, *prompts(), beams=beams, max_new=2, **options)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_wide_enough_it_finds_the_best_of_all(penalty):
    first, second = everything()
    out = found(tiny.VOCAB, stop=(STOP,), length_penalty=penalty)
    for row in range(len(first)):
        all_scores = {(STOP,): first[row, STOP]}
        for a, b in itertools.product(range(tiny.VOCAB), repeat=2):
            if a != STOP:
                all_scores[a, b] = (first[row, a] + second[row, a, b]) / 2**penalty
        best = sorted(all_scores, key=all_scores.get, reverse=True)[:5]
        got = [tuple(t[: m.sum()].tolist()) for t, m in zip(out.tokens[row], out.mask[row], strict=True)][:5]
        assert got == best
        np.testing.assert_allclose(out.scores[row, :5], [all_scores[b] for b in best], atol=1e-4)


def test_one_beam_is_greedy():
    case = tiny.case(CHAIN, "decoder")
    v = peft.realised(case.method, case.point, case.sites)
    greedy = generate(case.model, v, *prompts(), jax.random.key(0), max_new=4, sampling=GREEDY)
    out = search(case.model, v, *prompts(), beams=1, max_new=4, length_penalty=0.0)
    np.testing.assert_array_equal(out.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(out.scores[:, 0], greedy.logprobs.sum(1), atol=1e-4)


def test_few_beams_follow_their_own_cache():
    """Scores are those of scoring what was found: a beam that read another's cache would have other ones."""
    case = tiny.case(CHAIN, "decoder")
    v = peft.realised(case.method, case.point, case.sites)
    tokens, mask = prompts()
    out = search(case.model, v, tokens, mask, beams=3, max_new=5, length_penalty=0.0)
    for k in range(3):
        whole = {"tokens": np.concatenate([tokens, out.tokens[:, k]], 1)}
        whole["mask"] = np.concatenate([mask, out.mask[:, k]], 1)
        logp = np.asarray(jax.nn.log_softmax(case.forward(case.point, whole)))[:, tokens.shape[1] - 1 : -1]
        picked = np.take_along_axis(logp, np.asarray(out.tokens[:, k])[..., None], -1)[..., 0].sum(1)
        np.testing.assert_allclose(out.scores[:, k], picked, atol=1e-4)
        np.testing.assert_allclose(out.logprobs[:, k].sum(1), picked, atol=1e-4)
    assert (np.diff(out.scores, axis=1) <= 0).all()


def test_a_width_below_one_is_refused():
    with pytest.raises(FlagError, match="beams=0"):
        found(0)
