"""Schedules, parameterisations, weights and times against their defining equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion import process as processes
from research.diffusion import weights
from research.diffusion.parameterise import KINDS, parameterisation
from research.errors import FlagError

MADE = {
    "linear": processes.linear(),
    "cosine": processes.cosine(),
    "zero": processes.zero_snr(processes.linear()),
    "flow": processes.flow(3.0),
    "edm": processes.edm(),
}


@pytest.mark.parametrize("name", MADE)
def test_signal_falls_and_noise_rises(name):
    p = MADE[name]
    t = np.linspace(p.first, p.last, 500).astype(np.float32)
    log_snr = np.asarray(p.log_snr(t))
    assert (np.diff(log_snr[:-1]) < 0).all() and log_snr[-1] < log_snr[-2]
    assert np.isneginf(log_snr[-1]) == p.ends_in_noise == (float(p.alpha(p.last)) == 0)
    if name in ("linear", "cosine", "zero"):
        np.testing.assert_allclose(p.alpha(t) ** 2 + p.sigma(t) ** 2, 1, atol=1e-6)
        assert p.alpha(0.0) == 1 and p.sigma(0.0) == 0


def test_discrete_schedules_are_products_of_their_kernels():
    betas = np.linspace(1e-4, 0.02, 1000)
    n = np.array([1, 2, 500, 1000])
    bars = np.cumprod(1 - betas)[n - 1]
    linear, t = MADE["linear"], (n / 1000).astype(np.float32)
    np.testing.assert_allclose(linear.alpha(t) ** 2, bars, rtol=1e-5)
    np.testing.assert_allclose(linear.sigma(t) ** 2, 1 - bars, rtol=1e-5)
    # 4.04e-5 is what 1,000 linear steps leave of the signal
    np.testing.assert_allclose(linear.alpha(1.0) ** 2, 4.0358e-5, rtol=1e-4)
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    cosine = MADE["cosine"]
    np.testing.assert_allclose(cosine.alpha(0.5) ** 2, f(0.5) / f(0), rtol=1e-5)
    bars = np.asarray(cosine.alpha(np.float32([0.999, 1.0])), np.float64) ** 2
    np.testing.assert_allclose(1 - bars[1] / bars[0], 0.999, rtol=1e-4)  # the cap
    with pytest.raises(FlagError, match="every beta"):
        processes.linear(10, 1e-4, 1.5)


def test_zero_snr_keeps_the_first_step():
    zero, linear = MADE["zero"], MADE["linear"]
    assert float(zero.alpha(1.0)) == 0 and float(zero.sigma(1.0)) == 1
    np.testing.assert_allclose(zero.sigma(0.001), linear.sigma(0.001), rtol=1e-5)
    a, first, last = (float(linear.alpha(np.float32(u))) for u in (0.5, 0.001, 1.0))
    np.testing.assert_allclose(zero.alpha(0.5), (a - last) * first / (first - last), rtol=1e-5)
    for other in ("zero", "edm", "flow"):
        with pytest.raises(FlagError, match="cannot be rescaled"):
            processes.zero_snr(MADE[other])


def test_shift_fixes_the_ends():
    one, three = processes.flow(), processes.flow(3.0)
    t = np.linspace(0, 1, 11).astype(np.float32)
    np.testing.assert_allclose(one.sigma(t), t)
    np.testing.assert_allclose(three.sigma(t), 3 * t / (1 + 2 * t), rtol=1e-6)
    np.testing.assert_allclose(three.alpha(t) + three.sigma(t), 1, atol=1e-6)
    np.testing.assert_allclose(three.condition(np.float32(0.5)), 0.75)
    with pytest.raises(FlagError, match="shift=0"):
        processes.flow(0)


def test_grids():
    edm, zero = MADE["edm"], MADE["zero"]
    karras = processes.karras_times(edm, 18)
    np.testing.assert_allclose(karras[[0, -2, -1]], [80, 0.002, 0], rtol=1e-5)
    np.testing.assert_allclose(np.diff(karras[:-1] ** (1 / 7)), np.diff(karras[:2] ** (1 / 7))[0], rtol=1e-3)
    np.testing.assert_allclose(processes.even_times(zero, 4), [1, 0.75, 0.5, 0.25, 0])
    for p in (MADE["cosine"], zero):
        times = processes.log_snr_times(p, 10)
        assert len(times) == 11 and (np.diff(times) < 0).all() and times[0] == 1 and times[-1] == np.float32(p.first)
        gaps = np.diff(np.asarray(p.log_snr(times[2:-1])))
        np.testing.assert_allclose(gaps, gaps.mean(), rtol=0.02)
    with pytest.raises(FlagError, match="at least 2"):
        processes.karras_times(edm, 1)


@pytest.mark.parametrize("name", MADE)
def test_noised_moments(name):
    p = MADE[name]
    t = np.float32(p.first + 0.3 * (p.last - p.first))
    eps = np.random.default_rng(0).normal(size=(1, 100_000)).astype(np.float32)
    x = np.asarray(p.noised(np.full_like(eps, 0.7), eps, t[None]), np.float64)
    a, b = float(p.alpha(t)), float(p.sigma(t))
    assert abs(x.mean() - a * 0.7) < 4 * b / np.sqrt(1e5) and abs(x.var() / b**2 - 1) < 0.02


@functools.cache
def converted(name: str, kind: str):
    p, rng = MADE[name], np.random.default_rng(1)
    t = np.linspace(p.first, p.last, 64, dtype=np.float32)[:-1]
    x0, eps = rng.normal(size=(2, 63, 3)).astype(np.float32)
    a, b = (np.asarray(f(t))[:, None] for f in (p.alpha, p.sigma))
    x = a * x0 + b * eps
    k = parameterisation(kind, p, 0.7)
    target = k.target(x0, eps, a, b)
    return x0, eps, x, a, b, k, np.asarray(target)


@pytest.mark.parametrize(
    "name,kind", [(n, k) for n in MADE for k in KINDS if not MADE[n].ends_in_noise or k in "x0 v flow"]
)
def test_targets_convert_back(name, kind):
    x0, eps, x, a, b, k, target = converted(name, kind)
    got_x0, got_eps = k.split(target, x, a, b)
    # dividing by alpha or sigma magnifies the rounding of x
    np.testing.assert_allclose((got_x0 - x0) * np.minimum(a / b, 1), 0, atol=3e-6)
    np.testing.assert_allclose((got_eps - eps) * np.minimum(b / a, 1), 0, atol=3e-6)
    # gain: an error d of the output is an error sqrt(gain) d of x0
    moved = (k.split(target + 1, x, a, b)[0] - got_x0) * np.minimum(a / b, 1)
    gain = np.broadcast_to(np.sqrt(k.gain(a, b)) * np.minimum(a / b, 1), moved.shape)
    np.testing.assert_allclose(np.abs(moved), gain, atol=1e-4, rtol=1e-3)


def test_targets_have_the_fields_signs():
    x0, eps, x, a, b, _, v = converted("cosine", "v")
    np.testing.assert_allclose(v, a * eps - b * x0, atol=1e-6)
    np.testing.assert_allclose(converted("flow", "flow")[-1], eps - x0, atol=1e-6)
    x0, eps, x, a, b, k, f = converted("edm", "edm")
    root = np.sqrt(b**2 + 0.49)
    np.testing.assert_allclose(f, (x0 - 0.49 / root**2 * x) / (b * 0.7 / root), atol=1e-3)
    np.testing.assert_allclose(k.scale(a, b), 1 / root, rtol=1e-6)


def test_edm_preconditioning_has_unit_variances():
    p, d = MADE["edm"], 0.7
    k = parameterisation("edm", p, d)
    rng = np.random.default_rng(0)
    x0, eps = d * rng.normal(size=100_000), rng.normal(size=100_000)
    t = np.float32([0.002, 0.1, 0.7, 5, 80])
    for a, b in zip(np.asarray(p.alpha(t)), np.asarray(p.sigma(t)), strict=True):
        assert abs(np.var(k.scale(a, b) * (a * x0 + b * eps)) - 1) < 0.02
        assert abs(np.var(k.target(x0, eps, a, b)) - 1) < 0.02
    np.testing.assert_allclose(weights.weight("edm", p, k, sigma_data=d)(t), 1, rtol=1e-5)


def test_min_snr_by_its_formulas():
    p, t = MADE["cosine"], np.float32([0.1, 0.5, 0.9])
    snr = np.exp(np.asarray(p.log_snr(t)))
    least = np.minimum(snr, 5)
    expected = {"x0": least, "eps": least / snr, "v": least / (snr + 1)}
    for kind, value in expected.items():
        np.testing.assert_allclose(weights.weight("min_snr", p, parameterisation(kind, p))(t), value, rtol=1e-4)
    assert (expected["eps"] <= 1).all()
    zero = MADE["zero"]
    for kind in ("x0", "v", "flow"):
        ends = weights.weight("min_snr", zero, parameterisation(kind, zero))(np.float32([0, 1]))
        assert np.isfinite(ends).all()


@pytest.mark.parametrize("name", ["min_snr", "edm", "elbo"])
def test_weighted_gradients_do_not_depend_on_the_parameterisation(name):
    """The same denoiser, moved by the same parameter, written in four ways."""
    p = MADE["cosine"]
    rng = np.random.default_rng(3)
    t = np.linspace(0.1, 0.9, 8, dtype=np.float32)
    x0, eps = rng.normal(size=(2, 8, 4)).astype(np.float32)
    a, b = (f(t)[:, None] for f in (p.alpha, p.sigma))
    x = a * x0 + b * eps

    @jax.jit
    def gradients(theta):
        def mean(theta, kind):
            k = parameterisation(kind, p)
            guess = jnp.tanh(theta * x)  # of x0
            out = k.target(guess, (x - a * guess) / b, a, b)
            error = jnp.mean((out - k.target(x0, eps, a, b)) ** 2, axis=1)
            return jnp.mean(weights.weight(name, p, k)(t) * error)

        return jnp.stack([jax.grad(mean)(theta, kind) for kind in KINDS])

    found = gradients(jnp.float32(0.4))
    assert abs(found[0]) > 1e-3
    np.testing.assert_allclose(found, found[0], rtol=2e-3)


def test_elbo_is_half_the_slope_of_log_snr():
    p, t = processes.flow(), np.float32([0.2, 0.6])
    got = weights.weight("elbo", p, parameterisation("x0", p))(t)
    np.testing.assert_allclose(got, (1 / t + 1 / (1 - t)) * ((1 - t) / t) ** 2, rtol=1e-4)


def test_times():
    u = np.float32([0.1, 0.5, 0.9])
    flow, edm = processes.flow(), MADE["edm"]
    np.testing.assert_allclose(weights.quantile("uniform", flow)(u), 1e-3 + 0.999 * u, rtol=1e-6)
    got = np.asarray(weights.quantile("logit_normal", flow, 0.5, 2.0)(u))
    z = 1.2815515655
    np.testing.assert_allclose(got, 1e-3 + 0.999 / (1 + np.exp(-(0.5 + 2 * np.array([-z, 0, z])))), rtol=1e-4)
    got = np.log(np.asarray(weights.quantile("log_normal", edm)(u)))
    np.testing.assert_allclose(got, -1.2 + 1.2 * np.array([-z, 0, z]), atol=1e-4)
    even = np.sort(weights.draw(jax.random.key(0), 16))
    np.testing.assert_allclose(np.diff(even), 1 / 16, atol=1e-6)
    loose = np.asarray(weights.draw(jax.random.key(0), 16, low_discrepancy=False))
    assert np.diff(np.sort(loose)).std() > 0.01 and loose.min() >= 0 and loose.max() < 1
    fixed = np.asarray(weights.draw(None, 64))
    assert (fixed[:8] == weights.draw(None, 8)).all() and abs(fixed.mean() - 0.5) < 0.02


def test_what_is_refused():
    for kind in ("eps", "edm"):
        for name in ("zero", "flow"):
            with pytest.raises(FlagError, match="ends at SNR 0"):
                parameterisation(kind, MADE[name])
    with pytest.raises(FlagError, match="Did you mean 'eps'"):
        parameterisation("epsi", MADE["edm"])
    with pytest.raises(FlagError, match="min_snr"):
        weights.weight("minsnr", MADE["edm"], parameterisation("v", MADE["edm"]))
    with pytest.raises(FlagError, match="uniform"):
        weights.quantile("uniforms", MADE["edm"])
