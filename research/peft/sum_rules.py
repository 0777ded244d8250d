"""How weighted sums of adapters are made: the names, their options, and the sum of plain arrays. See `arithmetic`."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from research.errors import FlagError, did_you_mean
from research.peft.method import at_least
from research.peft.tree import layer_paths

# how: (what prunes each change, whether signs are elected)
PRUNED = {
    "magnitude_prune": ("largest", False),
    "ties": ("largest", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}
HOWS = ("linear", "cat", "svd", *PRUNED, *(f"{how}_svd" for how in PRUNED))
MAJORITIES = ("total", "frequency")


class Rule(NamedTuple):
    """How changes are summed."""

    weights: tuple[float, ...]
    prune: str | None  # "largest" or "random"
    elect: str | None  # "total" or "frequency"
    density: float
    seed: int
    rank: int | None
    exact: bool  # linear or cat

    def __call__(self, changes: Sequence[np.ndarray], name: str) -> np.ndarray:
        """The sum of one array of each adapter. Weights multiply after pruning, as in Hugging Face PEFT."""
        if self.prune:
            keep = {"largest": self.largest, "random": self.random}[self.prune]
            changes = [keep(x, i, name) for i, x in enumerate(changes)]
        changes = np.stack([np.asarray(x, np.float64) for x in changes])
        weighted = np.reshape(self.weights, (-1, *(1,) * (changes.ndim - 1))) * changes
        if not self.elect:
            return weighted.sum(axis=0)
        votes = changes if self.elect == "total" else np.sign(changes)
        agree = np.sign(changes) == np.where(votes.sum(axis=0) >= 0, 1, -1)
        return np.sum(weighted * agree, axis=0) / np.maximum(agree.sum(axis=0), 1)

    def largest(self, x: np.ndarray, i: int, name: str) -> np.ndarray:
        kept = np.zeros(x.size, bool)
        kept[np.argsort(-np.abs(x).ravel(), kind="stable")[: round(self.density * x.size)]] = True
        return np.where(kept.reshape(x.shape), x, 0.0)

    def random(self, x: np.ndarray, i: int, name: str) -> np.ndarray:
        words = np.random.Philox(key=[self.seed, zlib.crc32(f"{i}/{name}".encode())]).random_raw(x.size)
        return np.where(words.reshape(x.shape) < self.density * 2.0**64, x / self.density, 0.0)


def by_layer(rule: Rule, changes: list[np.ndarray], path: str) -> np.ndarray:
    """Applies the rule to each layer of a scanned stack by itself, as it would be in an unrolled one."""
    names = layer_paths(path, changes[0])
    if names == [path]:
        return rule(changes, path)
    return np.stack([rule([x[i] for x in changes], name) for i, name in enumerate(names)])


def checked(count: int, weights: Sequence[float], how: str, rank: Any, density: Any, majority: Any, seed: Any) -> Rule:
    """The rule of some options. Raises FlagError for those out of range or without use."""
    if how not in HOWS:
        raise FlagError(f"unknown how={how}.{did_you_mean(how, HOWS)}")
    if count == 0 or len(weights) != count:
        raise FlagError(f"{len(weights)} weights for {count} adapters: give one weight for each adapter.")
    if not all(np.isfinite(weights)):
        raise FlagError(f"weights={','.join(map(str, weights))} are not all finite numbers.")
    prune, elects = PRUNED.get(how.removesuffix("_svd"), (None, False))
    exact = how in ("linear", "cat")
    used = {"rank": not exact, "density": prune, "majority": elects, "seed": prune == "random"}
    for name, value in {"rank": rank, "density": density, "majority": majority, "seed": seed}.items():
        if value is not None and not used[name]:
            other = {"rank": "svd", "seed": "dare_linear"}.get(name, "ties")
            raise FlagError(f"how={how} does not use {name}={value}: leave it out, or choose how={other}.")
    at_least("rank", 1 if rank is None else rank, 1)
    at_least("seed", seed or 0, 0)
    density = 1.0 if density is None else density
    if not 0 < density <= 1:
        raise FlagError(f"density={density} is out of range: valid are 0 < density <= 1.")
    majority = majority or "total"
    if majority not in MAJORITIES:
        raise FlagError(f"unknown majority={majority}.{did_you_mean(majority, MAJORITIES)}")
    return Rule(tuple(map(float, weights)), prune, majority if elects else None, float(density), seed or 0, rank, exact)
