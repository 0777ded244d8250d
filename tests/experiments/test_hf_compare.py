"""The paired interval has a closed form that a small case shows."""

import numpy as np
import pytest

from experiments.hf_compare import compare


def test_difference_and_interval():
    labels = np.zeros(100, int)
    wrong = np.ones(100, int)
    ours, theirs = wrong.copy(), wrong.copy()
    ours[:60], theirs[:50] = 0, 0  # ours is right on the same 50 and on 10 more
    row = compare("lora", {0: ours, 1: ours}, {0: theirs}, labels)
    half = 1.96 * np.sqrt(0.1 * 0.9 / 99) * 100
    assert (row["ours %"], row["Hugging Face %"], row["difference"], row["seeds"]) == ("60.0", "50.0", "+10.0", 1)
    low, high = (float(x) for x in row["95 % interval"].split(" to "))
    assert (low, high) == pytest.approx((10 - half, 10 + half), abs=0.06)


def test_what_is_hard_for_both_cancels():
    labels = np.zeros(50, int)
    same = np.arange(50) % 2
    assert compare("full", {0: same}, {0: same}, labels)["95 % interval"] == "+0.0 to +0.0"
