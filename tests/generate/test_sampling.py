"""Filters against NumPy written out, and draws against their probabilities."""

import jax
import numpy as np
import pytest

from research.errors import FlagError
from research.generate.sampling import GREEDY, Sampling

LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.2, 0.05 - 1e-3, 1e-3], np.float32))


def kept(**options) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(Sampling(**options).filtered(LOGITS)))).tolist()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.39}, [0]),
        ({"top_p": 0.41}, [0, 2]),
        ({"top_p": 0.71}, [0, 2, 3]),
        ({"min_p": 0.6}, [0, 2]),
        ({"min_p": 0.1, "top_k": 3}, [0, 2, 3]),
        ({"top_k": 3, "top_p": 0.4}, [0]),  # 0.4 of 0.9 is 0.44
    ],
)
def test_what_the_filters_leave(options, expected):
    assert kept(**options) == expected


def test_draws_have_their_probabilities():
    rngs = jax.random.split(jax.random.key(0), 20_000)
    drawn = Sampling(temperature=0.5, top_k=3).draw(rngs, np.broadcast_to(LOGITS, (len(rngs), 6)))
    shares = np.bincount(np.asarray(drawn), minlength=6) / len(rngs)
    p = np.array([0.4, 0, 0.3, 0.2, 0, 0]) ** 2
    np.testing.assert_allclose(shares, p / p.sum(), atol=0.02)
    assert int(GREEDY.draw(rngs[:1], LOGITS[None])[0]) == 0


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 1}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(FlagError, match=f"{next(iter(options))}="):
        Sampling(**options)


def test_repetition_penalty_is_ctrls():
    logits = np.array([[2.0, -1.0, 0.5, 3.0], [2.0, -1.0, 0.5, 3.0]], np.float32)
    tokens, real = np.array([[3, 0, 1], [3, 0, 1]]), np.array([[0, 1, 1], [1, 1, 0]], bool)
    found = Sampling(repetition_penalty=2.0).constrained(logits, tokens, real, 3)
    np.testing.assert_allclose(found, [[1.0, -2.0, 0.5, 3.0], [1.0, -1.0, 0.5, 1.5]])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice(n):
    rng = np.random.default_rng(0)
    tokens, lengths, end = rng.integers(0, 3, (20, 9)), rng.integers(3, 8, 20), 7
    real = (np.arange(9) >= end - lengths[:, None]) & (np.arange(9) < end)
    found = np.asarray(Sampling(no_repeat_ngram=n).constrained(np.zeros((20, 4), np.float32), tokens, real, end))
    for row in range(20):
        said = tokens[row, end - lengths[row] : end].tolist()
        grams = {tuple(said[i : i + n]) for i in range(len(said) - n + 1)}
        banned = [t for t in range(4) if tuple([*said[len(said) - n + 1 :], t][-n:]) in grams]
        assert np.flatnonzero(np.isneginf(found[row])).tolist() == banned
