"""Preference pairs from scores, and KTO's mismatched rows."""

import numpy as np


def bradley_terry(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """P(first beats second) = 1 / (1 + exp(second - first)), [...] from scores [...]."""
    return 1 / (1 + np.exp(np.asarray(second, np.float64) - first))


def ranked(rewards: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[P, G] -> the k-th best and the k-th worst of each group for k below `pairs` (indices within it), and whether the
    first is worth more: each [P, pairs]. A NaN never is.
    """
    best, worst = (np.argsort(x, axis=1, kind="stable")[:, :pairs] for x in (-rewards, rewards))  # NaN comes last
    return best, worst, np.take_along_axis(rewards, best, 1) > np.take_along_axis(rewards, worst, 1)


def best_and_worst(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[P, G] -> best [P], worst [P] (indices within the group), and whether they differ [P]; NaN is never picked."""
    best, worst, differ = (x[:, 0] for x in ranked(rewards, 1))
    return best, worst, differ


def rotate(rows: int) -> np.ndarray:
    """[rows]: the row whose completion row i is mismatched with, the next one. A reversal would leave the middle row of
    an odd number its own.
    """
    return np.roll(np.arange(rows), -1)
