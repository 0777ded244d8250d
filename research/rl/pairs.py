"""Preference pairs from scores, and KTO's mismatched rows."""

import numpy as np

from research.rl.rewards import best_of


def bradley_terry(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """P(first beats second) = 1 / (1 + exp(second - first)), [...] from scores [...]."""
    return 1 / (1 + np.exp(np.asarray(second, np.float64) - first))


def best_and_worst(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[P, G] -> best [P], worst [P] (indices within the group), and whether they differ [P]; NaN is never picked."""
    best, worst = best_of(rewards), best_of(-rewards)
    high, low = (np.take_along_axis(rewards, i[:, None], axis=1)[:, 0] for i in (best, worst))
    return best, worst, high > low


def rotate(rows: int) -> np.ndarray:
    """[rows]: the row whose completion row i is mismatched with, the next one. A reversal would leave the middle row of
    an odd number its own.
    """
    return np.roll(np.arange(rows), -1)
