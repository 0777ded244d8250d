"""Rotary embedding against the formula, pair by pair."""

import math

import jax.numpy as jnp
import numpy as np

from research.nn.rope import angles, frequencies, rotate


def test_rotation_of_each_pair():
    rng = np.random.default_rng(0)
    x, theta = rng.normal(size=(2, 5, 3, 8)), 10000.0
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 11, 0, 100]])
    ours = rotate(jnp.asarray(x, jnp.float32), *angles(jnp.asarray(positions), frequencies(8, theta)))
    for b in range(2):
        for t in range(5):
            for i in range(4):
                turn = np.exp(1j * positions[b, t] * theta ** (-2 * i / 8))
                pair = (x[b, t, :, i] + 1j * x[b, t, :, i + 4]) * turn
                np.testing.assert_allclose(ours[b, t, :, i], pair.real, atol=1e-4)
                np.testing.assert_allclose(ours[b, t, :, i + 4], pair.imag, atol=1e-4)


def test_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
    score = lambda i, j: float(  # noqa: E731
        jnp.sum(rotate(q, *angles(jnp.array([[i]]), F)) * rotate(k, *angles(jnp.array([[j]]), F)))
    )
    assert abs(score(5, 2) - score(105, 102)) < 1e-4
    assert abs(score(5, 2) - score(6, 2)) > 1e-3


F = frequencies(16, 10000.0)


def test_linear_scaling():
    np.testing.assert_allclose(frequencies(8, 1e4, ("linear", 4.0)), frequencies(8, 1e4) / 4, rtol=1e-6)


def test_llama3_scaling():
    """Long wavelengths are stretched by the factor, short ones kept, those between blended (Llama 3.1)."""
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    plain, ours = frequencies(128, 500000.0), frequencies(128, 500000.0, ("llama3", factor, low, high, original))
    kinds = set()
    for f, scaled in zip(plain, ours, strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < original / high:
            kinds.add("kept")
            expected = f
        elif wavelength > original / low:
            kinds.add("stretched")
            expected = f / factor
        else:
            kinds.add("blended")
            smooth = (original / wavelength - low) / (high - low)
            expected = (1 - smooth) * f / factor + smooth * f
        np.testing.assert_allclose(scaled, expected, rtol=1e-5)
    assert kinds == {"kept", "blended", "stretched"}


def test_bf16_angles_stay_exact():
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    late = rotate(x, *angles(jnp.array([[4097]]), frequencies(8, 1e4)))
    assert late.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), *angles(jnp.array([[4097]]), frequencies(8, 1e4)))
    np.testing.assert_allclose(late.astype(jnp.float32), exact, atol=0.01)
