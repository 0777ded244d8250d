"""Frechet distance between two sets of images by the mean and covariance of their features (1706.08500).

    |m1 - m2|^2 + tr(C1 + C2) - 2 tr (C1^1/2 C2 C1^1/2)^1/2

In float64 NumPy, by symmetric eigendecompositions: the square root of the product of two covariances by a general
matrix function returns complex numbers, which other programs cut off. The distance is biased by about 1 / N and its
scale is the feature network's: two sets are compared only when N and network are the same.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from research.errors import DataError, FlagError


class Moments(NamedTuple):
    """`count` N; `mean` [F]; `scatter` [F, F] = sum of (f - mean)(f - mean)'; `network` made the features."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray
    network: str

    @property
    def covariance(self) -> np.ndarray:
        """scatter / (N - 1), [F, F]."""
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray, network: str) -> Moments:
    """features [N, F] -> their moments. Raises DataError: not a matrix, no rows, or values that are not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not features.size:
        raise DataError(f"features of shape {features.shape} must be [N, F] with at least one row")
    if not np.isfinite(features).all():
        raise DataError(f"features of {network!r} are not all finite")
    mean = features.mean(0)
    return Moments(len(features), mean, (features - mean).T @ (features - mean), network)


def add(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together, without cancellation (Chan et al. 1983). Raises FlagError: other networks."""
    _same_network(a, b)
    count, shift = a.count + b.count, b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, a.mean + shift * (b.count / count), scatter, a.network)


def distance(a: Moments, b: Moments) -> float:
    """The squared distance, at least 0. Raises FlagError: other networks; DataError: unequal N, or fewer than 2."""
    _same_network(a, b)
    if a.count != b.count:
        raise DataError(f"Frechet distance needs as many images on both sides: {a.count} and {b.count}")
    if a.count < 2:
        raise DataError("Frechet distance needs at least 2 images a side")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ b.covariance @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    gap = np.sum((a.mean - b.mean) ** 2)
    return float(max(gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross, 0.0))


def network_name(name: str, leaves: Mapping[str, np.ndarray]) -> str:
    """ "name-" and 12 hex digits over the paths, shapes, dtypes and bytes of the network's weights."""
    digest = hashlib.sha256()
    for path in sorted(leaves):
        x = np.ascontiguousarray(leaves[path])
        digest.update(f"{path} {x.shape} {x.dtype} ".encode() + x.tobytes())
    return f"{name}-{digest.hexdigest()[:12]}"


def _same_network(a: Moments, b: Moments) -> None:
    if a.network != b.network:
        raise FlagError(f"features of different networks cannot be compared: {a.network!r} and {b.network!r}")
