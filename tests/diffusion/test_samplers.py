"""Samplers against the exact Gaussian, and guidance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion import process as processes
from research.diffusion import samplers
from research.diffusion.denoiser import Guidance, denoiser
from research.diffusion.parameterise import parameterisation
from research.errors import FlagError
from tests.diffusion.gaussian import MEAN, STD, flowed, ideal

COSINE, EDM, FLOW = processes.cosine(), processes.edm(), processes.flow()
ZERO = processes.zero_snr(processes.linear())
POINTS = np.float32([[-1.3], [0.4], [1.1]])
GRIDS = {
    "edm": (EDM, processes.karras_times),
    "vp": (COSINE, processes.log_snr_times),
    "flow": (FLOW, processes.even_times),
}


def errors(name: str, where: str, counts: list[int]) -> np.ndarray:
    """Largest error of the end point for each number of steps."""
    process, grid = GRIDS[where]
    x = POINTS * float(process.sigma(process.last))
    times = [grid(process, n) for n in counts]
    run = jax.jit(lambda x: [samplers.sampler(name)(ideal(process), process, t, x) for t in times])
    ends = [flowed(process, x, t[0], t[-1]) for t in times]
    return np.array([np.abs(got - end).max() for got, end in zip(run(x), ends, strict=True)])


@pytest.mark.parametrize(
    "name,where,order",
    [
        ("euler", "edm", 1),
        ("heun", "edm", 2),
        pytest.param("ddim", "vp", 1, marks=pytest.mark.slow),
        pytest.param("dpmpp_2m", "vp", 2, marks=pytest.mark.slow),
        pytest.param("heun", "vp", 2, marks=pytest.mark.slow),
        ("euler", "flow", 1),
        ("heun", "flow", 2),
    ],
)
def test_order_of_convergence(name, where, order):
    found = errors(name, where, [16, 32, 64, 128] if order == 1 else [16, 32, 64])
    orders = np.log2(found[:-1] / found[1:])
    assert order - 0.25 < orders[-1] < order + 0.35, orders
    assert orders.min() > order - 0.6, orders


@pytest.mark.slow
@pytest.mark.parametrize("process", [COSINE, ZERO, FLOW, EDM], ids=["cosine", "zero", "flow", "edm"])
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_a_perfect_denoiser_recovers_the_point(process, kind):
    point = jnp.float32([[0.7, -0.2]])
    p = parameterisation(kind, process)

    def network(x, seen, labels):
        """Knows the point: what it should return follows from x and the time, which is read back from `seen`."""
        t = jnp.exp(4 * seen) if process is EDM else seen
        a, b = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return jnp.broadcast_to(p.target(point, (x - a * point) / b, a, b), x.shape)

    denoise = denoiser(network, process, kind)
    grids = [processes.even_times(process, n) for n in (1, 2, 5)]

    def run(rng):
        draw = lambda name, t, **k: samplers.sample(name, denoise, process, t, rng, jnp.arange(3), (2,), **k)  # noqa: E731
        return [draw(name, t) for name in samplers.SAMPLERS for t in grids]

    for got in jax.jit(run)(jax.random.key(0)):
        np.testing.assert_allclose(got, np.broadcast_to(point, (3, 2)), atol=2e-5)


@functools.cache
def ancestral(steps: int, eta: float) -> np.ndarray:
    times = processes.even_times(COSINE, steps)
    keys = samplers.image_keys(jax.random.key(1), jnp.arange(20_000))
    x = samplers.start(COSINE, keys, (1,))
    return np.asarray(samplers.ddim(ideal(COSINE), COSINE, times, x, keys, eta=eta))[:, 0]


def recursion(process: processes.Process, steps: int) -> tuple[float, float]:
    """Mean and variance of ancestral sampling's result, by the linear recursion of its posterior mean and variance."""
    times = processes.even_times(process, steps)
    bars = np.asarray(process.alpha(times), np.float64) ** 2
    mean, var = 0.0, 1.0
    for bar_t, bar_s in zip(bars[:-1], bars[1:], strict=True):
        alpha = bar_t / bar_s
        gain = np.sqrt(bar_t) * STD**2 / (bar_t * STD**2 + 1 - bar_t)  # x0 = MEAN + gain (x - sqrt(bar) MEAN)
        on_x0 = np.sqrt(bar_s) * (1 - alpha) / (1 - bar_t)
        on_x = np.sqrt(alpha) * (1 - bar_s) / (1 - bar_t)
        mean = on_x0 * (MEAN + gain * (mean - np.sqrt(bar_t) * MEAN)) + on_x * mean
        var = (on_x0 * gain + on_x) ** 2 * var + (1 - alpha) * (1 - bar_s) / (1 - bar_t)
    return mean, var


@pytest.mark.slow
def test_ancestral_sampling_has_the_variance_of_its_recursion():
    for steps in (4, 20):
        mean, var = recursion(COSINE, steps)
        got = ancestral(steps, 1.0)
        assert abs(got.mean() - mean) < 4 * np.sqrt(var / len(got))
        assert abs(got.var() / var - 1) < 4 * np.sqrt(2 / len(got))
    assert recursion(COSINE, 4)[1] < recursion(COSINE, 20)[1] < recursion(COSINE, 1000)[1] < STD**2
    assert recursion(COSINE, 1000)[1] > 0.97 * STD**2


@pytest.mark.slow
def test_ddim_draws_nothing_and_ddpm_does():
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(4))
    times = processes.even_times(COSINE, 3)
    x = samplers.start(COSINE, keys, (2,))
    run = lambda eta, keys: samplers.ddim(ideal(COSINE), COSINE, times, x, keys, eta)  # noqa: E731
    assert (run(0.0, None) == run(0.0, keys)).all()
    assert (run(0.0, None) == samplers.euler(ideal(COSINE), COSINE, times, x)).all()
    assert (run(1.0, keys) == samplers.ddpm(ideal(COSINE), COSINE, times, x, keys)).all()
    assert not np.allclose(run(1.0, keys), run(0.5, keys), atol=1e-3)
    for eta, given, words in ((0.5, None, "a key"), (2.0, keys, "must lie")):
        with pytest.raises(FlagError, match=words):
            run(eta, given)
    with pytest.raises(FlagError, match="Did you mean 'heun'"):
        samplers.sampler("hein")


@pytest.mark.slow
def test_inversion_returns():
    data = np.float32([[-0.4], [0.2], [0.9]])
    found = []
    for steps in (10, 40):
        times = processes.even_times(COSINE, steps)
        there = samplers.invert(ideal(COSINE), COSINE, times, data)
        found.append(np.abs(samplers.ddim(ideal(COSINE), COSINE, times, there) - data).max())
    assert found[0] < 0.3 and found[1] < 0.35 * found[0], found  # first order


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "heun"])
def test_an_image_is_the_same_in_any_batch_and_on_any_mesh(name):
    times, rng = processes.even_times(COSINE, 3), jax.random.key(5)
    run = jax.jit(lambda index: samplers.sample(name, ideal(COSINE), COSINE, times, rng, index, (2, 2)))
    whole = np.asarray(run(jnp.arange(16)))
    parts = np.concatenate([run(jnp.arange(8)), run(jnp.arange(8, 16))])
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert len(np.unique(whole.round(4))) == whole.size
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(jnp.arange(16), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    np.testing.assert_allclose(run(spread), whole, atol=1e-6)
    keys = samplers.image_keys(rng, jnp.array([3]))
    np.testing.assert_array_equal(
        samplers.noise(keys, 0, (2,))[0], samplers.noise(samplers.image_keys(rng, jnp.arange(8)), 0, (2,))[3]
    )


def network(x: jax.Array, t: jax.Array, labels: jax.Array | None) -> jax.Array:
    """Something whose rows differ by label."""
    shift = 0.0 if labels is None else 0.1 * labels[:, None]
    return jnp.sin(x * (1 + shift)) + shift + t[:, None]


LABELS = jnp.array([0, 1, 2])


def guided(scale: float, **options):
    return denoiser(network, COSINE, "eps", LABELS, Guidance(scale, 3, **options))


def test_guidance_is_linear_between_the_models():
    x, t = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32), jnp.float32(0.4)
    conditional = denoiser(network, COSINE, "eps", LABELS)(x, t)
    none = denoiser(network, COSINE, "eps", jnp.full(3, 3))(x, t)
    assert all((a == b).all() for a, b in zip(guided(1.0)(x, t), conditional, strict=True))
    np.testing.assert_allclose(guided(0.0)(x, t)[1], none[1], atol=1e-6)
    expected = none[1] + 2.5 * (conditional[1] - none[1])
    np.testing.assert_allclose(guided(2.5)(x, t)[1], expected, atol=1e-5)
    a, b = COSINE.alpha(t), COSINE.sigma(t)
    np.testing.assert_allclose(guided(2.5)(x, t)[0], (x - b * expected) / a, atol=1e-5)
    calls = []
    counted = lambda x, t, labels: (calls.append(len(x)), network(x, t, labels))[1]  # noqa: E731
    denoiser(counted, COSINE, "eps", LABELS, Guidance(2.0, 3))(x, t)
    denoiser(counted, COSINE, "eps", LABELS, Guidance(1.0, 3))(x, t)
    assert calls == [6, 3]


def test_interval_and_rescale():
    x, t = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32), jnp.float32(0.4)
    conditional = denoiser(network, COSINE, "eps", LABELS)(x, t)
    assert (guided(3.0, interval=(0.5, 0.9))(x, t)[1] == conditional[1]).all()
    np.testing.assert_allclose(guided(3.0, interval=(0.3, 0.9))(x, t)[1], guided(3.0)(x, t)[1], atol=1e-6)
    whole, half, plain = (np.asarray(guided(3.0, rescale=r)(x, t)[1]) for r in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(whole.std(1), np.asarray(conditional[1]).std(1), rtol=1e-4)
    np.testing.assert_allclose(half, (whole + plain) / 2, atol=1e-5)


def test_guidance_that_is_refused():
    with pytest.raises(FlagError, match="unconditional"):
        denoiser(network, COSINE, "eps", None, Guidance(2.0, 3))
    for wrong in ({"scale": float("nan")}, {"rescale": 2.0}, {"interval": (0.5, 0.5)}):
        with pytest.raises(FlagError, match=next(iter(wrong))):
            Guidance(**{"scale": 2.0, "null": 3, **wrong})


def test_guidance_sharpens_a_gaussian_by_its_closed_form():
    """N(1, s^2) against an unconditional N(0, s^2): the scores differ by a constant, so w = 3 moves the mean to 3."""
    means = jnp.array([1.0, 0.0])

    def score(x, seen, labels):
        t = seen[:, None]
        return ideal(COSINE, means[labels][:, None])(x, t)[1]

    denoise = denoiser(score, COSINE, "eps", jnp.zeros(3, int), Guidance(3.0, 1))
    for got, want in zip(denoise(POINTS, jnp.float32(0.6)), ideal(COSINE, 3.0)(POINTS, 0.6), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
