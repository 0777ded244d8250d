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
