"""Closed forms of the Frechet distance, and of the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion import ema, frechet
from research.errors import DataError, FlagError

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(50, 6)) * np.arange(1, 7), RNG.normal(size=(50, 6)) @ RNG.normal(size=(6, 6)) + 1


def test_identical_and_shifted_sets():
    a = frechet.moments(A, "net")
    assert 0 <= frechet.distance(a, a) < 1e-9
    shift = np.array([1.0, -2, 0, 0, 0.5, 3])
    np.testing.assert_allclose(frechet.distance(a, frechet.moments(A + shift, "net")), shift @ shift, rtol=1e-9)
    np.testing.assert_allclose(
        frechet.distance(a, frechet.moments(3 * A, "net")), 4 * (a.mean @ a.mean + np.trace(a.covariance))
    )


def test_symmetry_and_the_trace_of_the_square_root():
    a, b = frechet.moments(A, "net"), frechet.moments(B, "net")
    np.testing.assert_allclose(a.covariance, np.cov(A.T), rtol=1e-12)
    found = frechet.distance(a, b)
    np.testing.assert_allclose(frechet.distance(b, a), found, rtol=1e-9)
    # the eigenvalues of the unsymmetric product are the same, and real
    roots = np.sqrt(np.linalg.eigvals(np.cov(A.T) @ np.cov(B.T)).real).sum()
    gap = ((A.mean(0) - B.mean(0)) ** 2).sum()
    np.testing.assert_allclose(found, gap + np.trace(np.cov(A.T)) + np.trace(np.cov(B.T)) - 2 * roots, rtol=1e-8)


def test_diagonal_gaussians():
    a = frechet.Moments(11, np.zeros(3), 10 * np.diag([1.0, 4, 0]), "net")
    b = frechet.Moments(11, np.ones(3), 10 * np.diag([9.0, 1, 4]), "net")
    np.testing.assert_allclose(frechet.distance(a, b), 3 + (2**2 + 1**2 + 2**2))


def test_accumulation_is_exact_far_from_zero():
    far = B + 1e6
    parts = [frechet.moments(x, "net") for x in (far[:7], far[7:8], far[8:])]
    got, want = frechet.add(frechet.add(parts[0], parts[1]), parts[2]), frechet.moments(far, "net")
    assert got.count == 50
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-12)
    np.testing.assert_allclose(got.covariance, np.cov(far.T), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_compared():
    a = frechet.moments(A, "net")
    with pytest.raises(DataError, match="50 and 49"):
        frechet.distance(a, frechet.moments(B[1:], "net"))
    for call in (frechet.distance, frechet.add):
        with pytest.raises(FlagError, match="'net' and 'other'"):
            call(a, frechet.moments(B, "other"))
    one = frechet.moments(A[:1], "net")
    with pytest.raises(DataError, match="at least 2"):
        frechet.distance(one, one)
    for wrong in (A[0], A[:0], A * np.nan):
        with pytest.raises(DataError, match="features"):
            frechet.moments(wrong, "net")


def test_a_network_is_named_by_its_weights():
    leaves = {"a": np.zeros(3), "b": np.ones((2, 2))}
    name = frechet.network_name("cnn", leaves)
    assert name.startswith("cnn-") and len(name) == 16
    assert name == frechet.network_name("cnn", dict(reversed(leaves.items())))
    for other in (
        {"a": np.zeros(3), "c": np.ones((2, 2))},
        leaves | {"a": np.zeros(3, np.float32)},
        leaves | {"b": np.eye(2)},
    ):
        assert frechet.network_name("cnn", other) != name


def test_ema_is_geometric():
    tree = lambda x: {"w": jnp.full(2, x, jnp.float32), "frozen": None, "count": jnp.int32(x)}  # noqa: E731
    average = tree(0.0)
    for n in range(5):
        average = ema.update(average, tree(1.0 + n), n, 0.9, warm_up=False)
    closed = sum(0.1 * 0.9 ** (4 - n) * (1.0 + n) for n in range(5))
    np.testing.assert_allclose(average["w"], closed, rtol=1e-6)
    assert average["frozen"] is None and average["count"] == 5


def test_ema_warm_up_and_its_ends():
    np.testing.assert_allclose([ema.decay_at(n, 0.9) for n in (0, 1, 8, 10**6)], [0.1, 2 / 11, 0.5, 0.9], rtol=1e-6)
    old, new = {"w": jnp.float32(0.3)}, {"w": jnp.float32(0.7)}
    assert ema.update(old, new, 0, 0.0, False) == new and ema.update(old, new, 0, 1.0, False) == old
    average = jax.jit(lambda n: ema.update(old, new, n, 0.999))(jnp.int32(0))
    np.testing.assert_allclose(average["w"], 0.1 * 0.3 + 0.9 * 0.7, rtol=1e-6)
    # of constant parameters, what is left of the start is the product of the decays
    x, left = {"w": jnp.float32(1.0)}, 1.0
    for n in range(6):
        x, left = ema.update(x, {"w": jnp.float32(0.0)}, n, 0.3), left * min(0.3, (1 + n) / (10 + n))
    np.testing.assert_allclose(x["w"], left, rtol=1e-5)
    assert (
        ema.update({"w": jnp.ones(1, jnp.float32)}, {"w": jnp.ones(1, jnp.bfloat16)}, 0, 0.9)["w"].dtype == jnp.float32
    )
