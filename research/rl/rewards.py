"""Rewards: functions of texts, several weighted; and the best of n samples.

A reward function maps (prompts, completions), two lists of strings, to a list of floats; None or NaN where a completion
cannot be scored. Weighted sums leave such a reward out; a completion no function scores gets NaN, which the group
advantages (`research.rl.advantages`) turn into 0.

    KL(best of n || policy) <= log n - (n - 1) / n, equal without ties      arXiv 2009.01325, appendix
    E max of n, unbiased from N samples R_(1) <= ...: sum_i C(i - 1, n - 1) / C(N, n) R_(i)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from research.errors import DataError, FlagError

RewardFn = Callable[[list[str], list[str]], Sequence[float | None]]


class Rewards(NamedTuple):
    """total [N] fp32, NaN where nothing could be scored; each function's own [N]; how many each could not score."""

    total: np.ndarray
    each: dict[str, np.ndarray]
    unscored: dict[str, int]


def score(
    functions: Mapping[str, RewardFn],
    prompts: Sequence[str],
    completions: Sequence[str],
    weights: Mapping[str, float] | None = None,
) -> Rewards:
    """Weights are 1 by default.

    Raises DataError: a function returned another number of values. FlagError: no function, or a weight without one.
    """
    weights = dict(weights or {})
    if not functions:
        raise FlagError("no reward function is given")
    if lost := set(weights) - set(functions):
        raise FlagError(f"weights of {sorted(lost)}, but the reward functions are {sorted(functions)}")
    each = {}
    for name, fn in functions.items():
        values = list(fn(list(prompts), list(completions)))
        if len(values) != len(completions):
            raise DataError(f"reward {name!r} gave {len(values)} values for {len(completions)} completions")
        values = np.asarray([math.nan if v is None else float(v) for v in values], np.float32)
        each[name] = np.where(np.isfinite(values), values, np.nan)
    table = np.stack([weights.get(name, 1.0) * v for name, v in each.items()])
    fine = np.isfinite(table)
    total = np.where(fine.any(axis=0), np.where(fine, table, 0.0).sum(axis=0), np.nan)
    return Rewards(total.astype(np.float32), each, {k: int(np.isnan(v).sum()) for k, v in each.items()})


def best_of(rewards: np.ndarray) -> np.ndarray:
    """[P, n] -> [P] index of the best; a NaN never wins against a number."""
    return np.argmax(np.where(np.isnan(rewards), -np.inf, rewards), axis=-1)


def best_of_kl(n: int) -> float:
    """The bound in nats."""
    return math.log(n) - (n - 1) / n


def expected_best(rewards: np.ndarray, n: int, of: np.ndarray | None = None) -> np.ndarray:
    """[..., N] -> [...]: the mean over all subsets of n of the best one's reward, or of its value in `of` [..., N],
    which may be another judge's. Raises FlagError: n is not 1 to N.
    """
    pool = rewards.shape[-1]
    if not 1 <= n <= pool:
        raise FlagError(f"best of {n} from {pool} samples: n must be 1 to {pool}")
    chance = np.asarray([math.comb(i, n - 1) / math.comb(pool, n) for i in range(pool)])
    order = np.argsort(rewards, axis=-1, kind="stable")
    return np.take_along_axis(rewards if of is None else of, order, axis=-1) @ chance
