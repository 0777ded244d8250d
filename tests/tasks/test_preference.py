"""Golden numbers computed in float64, identities, and what the losses converge to on a table of six responses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError
from research.tasks import preference as p
from research.tasks.preference import Completion, Options

WIN = Completion(*(jnp.asarray(x) for x in ([-10.0, -12, -7.5], [4.0, 6, 5], [-10.5, -11, -9.5])))
LOSE = Completion(*(jnp.asarray(x) for x in ([-11.0, -9, -8], [5.0, 3, 4], [-10.0, -9.5, -8.5])))
NAMES = list(p.LOSSES)


def rows(name: str, **options) -> np.ndarray:
    return np.asarray(p.rows(name, WIN, LOSE, Options(**options)))


@pytest.mark.parametrize(
    "name,options,mean",
    [
        ("dpo", {}, 0.670957047789532),
        ("dpo", {"label_smoothing": 0.1}, 0.675957047789532),
        ("robust", {"label_smoothing": 0.1}, 0.664707047789532),
        ("ipo", {}, 22.25),
        ("ipo", {"length_normalised": True}, 24.2085648148),
        ("hinge", {}, 0.95),
        ("apo_zero", {}, 0.987554466),
        ("nca", {}, 1.377383581),
        ("bco_pair", {}, 1.364103711),
        ("sppo_hard", {}, 47.25),
        ("simpo", {"beta": 2.0, "gamma": 1.0}, 0.930103203),
    ],
)
def test_golden_mean(name, options, mean):
    np.testing.assert_allclose(rows(name, **options).mean(), mean, rtol=1e-6)


def test_golden_rows():
    np.testing.assert_allclose(rows("dpo"), [0.620957048, 0.770957048, 0.620957048], rtol=1e-6)
    np.testing.assert_allclose(rows("simpo", beta=2.0), [1.783900741, 0.313261688, 0.693147181], rtol=1e-6)
    odds = p.log_odds_ratio(WIN, LOSE)
    np.testing.assert_allclose(odds, [-0.331786165, 1.094344277, 0.607069001], rtol=1e-5)
    np.testing.assert_allclose(-jax.nn.log_sigmoid(odds).mean(), 0.532159152, rtol=1e-6)
    np.testing.assert_allclose(rows("orpo", beta=1.0).mean() + WIN.mean.mean(), 0.532159152, rtol=1e-6)
    nll = np.mean([2.5, 2, 1.5])
    np.testing.assert_allclose(rows("cpo").mean(), nll + np.mean(np.log1p(np.exp([-0.1, 0.3, -0.05]))), rtol=1e-6)


def test_golden_kto():
    for good, want in ((True, 0.495018844), (False, 0.492515120)):
        side = WIN if good else LOSE
        out = p.kto(side, jnp.full(3, good), jnp.asarray(0.3), Options())
        np.testing.assert_allclose(out.mean(), want, rtol=1e-6)
        absent = out.metrics["rewards/rejected" if good else "rewards/chosen"]
        assert [float(x) for x in absent] == [0, 0], "a batch of one kind"


def test_step_zero():
    same = (WIN._replace(reference=WIN.logps), LOSE._replace(reference=LOSE.logps), Options())
    want = {"dpo": np.log(2), "ipo": 25, "hinge": 1, "nca": 2 * np.log(2), "bco_pair": 2 * np.log(2), "apo_zero": 1}
    want |= {"sppo_hard": 50, "apo_down": 1, "robust": np.log(2)}
    for name, value in want.items():
        np.testing.assert_allclose(p.rows(name, *same), value, rtol=1e-6, err_msg=name)
    kto = p.kto(same[0], jnp.asarray([1, 0, 1]), p.kto_baseline(same[1]), Options())
    assert float(kto.mean()) == 0.5
    metrics = p.paired("dpo", *same).metrics
    assert all(float(metrics[f"rewards/{k}"][0]) == 0 for k in ("chosen", "rejected", "margins", "accuracies"))


def test_identities():
    swapped = lambda name, **o: np.asarray(p.rows(name, LOSE, WIN, Options(**o)))  # noqa: E731
    np.testing.assert_allclose(rows("dpo") - swapped("dpo"), [-0.15, 0.15, -0.15], atol=1e-6)
    flipped = 0.8 * rows("robust", label_smoothing=0.2) + 0.2 * swapped("robust", label_smoothing=0.2)
    np.testing.assert_allclose(flipped, rows("dpo"), atol=1e-6)
    assert p.log1mexp(jnp.asarray([-1e-8, -800.0])).tolist() == [pytest.approx(np.log(1e-7), abs=1e-3), 0]
    slope = jax.grad(lambda x: p.log1mexp(x).sum())(jnp.asarray([-1e-8, -0.5, -1.0, -800.0]))
    assert np.isfinite(slope).all()
    gradient = jax.grad(lambda h: p.rows("dpo", WIN._replace(logps=h), LOSE, Options()).sum())(WIN.logps)
    np.testing.assert_allclose(gradient, -0.1 * jax.nn.sigmoid(-0.1 * jnp.asarray([1.5, -1.5, 1.5])), atol=1e-6)
    metrics = p.paired("dpo", WIN, LOSE, Options()).metrics
    assert float(metrics["rewards/accuracies"][0]) == 2 and float(metrics["logps/chosen"][0]) == -29.5


def test_divergences():
    """Each is 0 at the reference; as functions of u = exp h they are u-derivatives of u log u, -log u and Jensen's."""
    h = jnp.asarray([-1.0, 0, 2])
    u, of = np.exp(h), p.DIVERGENCES
    np.testing.assert_allclose(of["reverse_kl"](h), np.log(u), atol=1e-6)
    np.testing.assert_allclose(of["forward_kl"](h), 1 - 1 / u, rtol=1e-5)
    np.testing.assert_allclose(of["js"](h), np.log(2 * u / (1 + u)), atol=1e-6)
    want = -np.log(1 / (1 + np.exp(-0.1 * (np.log(2 / (1 + np.exp(-0.5))) - np.log(2 / (1 + np.exp(1)))))))
    np.testing.assert_allclose(rows("dpo", divergence="js")[0], want, rtol=1e-5)


def test_baseline_of_kto():
    higher = WIN._replace(reference=WIN.logps - 2)
    assert float(p.kto_baseline(higher)) == 2
    assert float(p.kto_baseline(WIN._replace(reference=WIN.logps + 2))) == 0
    assert float(p.kto_baseline(higher, jnp.zeros(3))) == 0
    assert not jax.grad(lambda x: p.kto_baseline(higher._replace(logps=x)))(WIN.logps).any()


def random_rows(count: int = 4, length: int = 5) -> dict:
    rng = np.random.default_rng(0)
    mask = (np.arange(length) < rng.integers(1, length + 1, (2, count, 1))).astype(np.float32)
    logps, reference = -rng.uniform(0.1, 2, (2, 2, count, length)).astype(np.float32)
    return {"mask": mask, "logps": np.where(mask, logps, np.nan), "reference": np.where(mask, reference, np.inf)}


@functools.cache
def gradient(name: str):
    def total(logps, data, weight):
        sides = [p.completion(logps[i], data["mask"][i], data["reference"][i]) for i in (0, 1)]
        if name == "kto":
            out = p.kto(sides[0], jnp.arange(len(weight)) % 2 == 0, jnp.asarray(0.2), Options(undesirable=1.3), weight)
        else:
            out = p.paired(name, *sides, Options(), weight)
        return out.sum, out._replace(outputs=None)

    return jax.jit(jax.grad(total, has_aux=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "kto"])
def test_micro_batches_add_up_to_the_batch(name):
    data, weight = random_rows(), np.asarray([1, 2, 0.5, 1], np.float32)
    run = lambda part: gradient(name)(  # noqa: E731
        data["logps"][:, part], {k: v[:, part] for k, v in data.items()}, weight[part]
    )
    grads, whole = run(slice(0, 4))
    parts = [run(slice(0, 2)), run(slice(2, 4))]
    np.testing.assert_allclose(np.concatenate([g for g, _ in parts], axis=1), grads, atol=1e-6)
    added = jax.tree.map(lambda a, b: a + b, parts[0][1], parts[1][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), added, whole)
    assert np.isfinite(grads).all() and not grads[data["mask"] == 0].any(), "what is masked leaks nothing"


def test_empty_side_weighs_nothing():
    out = p.paired("dpo", WIN._replace(length=jnp.asarray([0.0, 6, 5])), LOSE, Options())
    assert float(out.weight) == 2


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"divergence": "revers_kl"}])
def test_refuses(bad):
    with pytest.raises(FlagError, match=next(iter(bad))):
        Options(**bad)
    with pytest.raises(FlagError, match="Did you mean 'hinge'"):
        p.rows("hing", WIN, LOSE, Options())


# Six responses to one prompt, whose preferences are exactly Bradley and Terry's.
REWARD = np.asarray([1.0, 0.2, -0.5, 0.7, -1.2, 0.0])
PRIOR = np.asarray([0.1, 0.25, 0.2, 0.05, 0.15, 0.25])
PREFERS = 1 / (1 + np.exp(REWARD[None] - REWARD[:, None]))
BETA = 0.8


def tilted(gain: np.ndarray) -> np.ndarray:
    w = PRIOR * np.exp(gain / BETA)
    return w / w.sum()


@functools.cache
def converged(name: str, smoothing: float, flips: float, steps: int = 4000, rate: float = 1.5) -> np.ndarray:
    """Gradient descent on the expected loss over all ordered pairs, each weighted by its probability."""
    first, second = (x.ravel() for x in np.meshgrid(range(6), range(6), indexing="ij"))
    chance = jnp.asarray(((1 - flips) * PREFERS + flips * PREFERS.T).ravel() * (first != second))
    options, prior, one = Options(beta=BETA, label_smoothing=smoothing), jnp.log(PRIOR), jnp.ones((36, 1))

    def loss(theta):
        logps = jax.nn.log_softmax(theta)
        sides = [p.completion(logps[i][:, None], one, prior[i][:, None]) for i in (first, second)]
        out = p.paired(name, *sides, options, chance)
        return out.sum / out.weight

    descend = jax.jit(lambda t: jax.lax.fori_loop(0, steps, lambda _, t: t - rate * jax.grad(loss)(t), t))
    return np.asarray(jax.nn.softmax(descend(jnp.log(PRIOR))))


def variation(a: np.ndarray, b: np.ndarray) -> float:
    return 0.5 * float(np.abs(a - b).sum())


def test_dpo_reaches_the_closed_form():
    assert variation(converged("dpo", 0.0, 0.0), tilted(REWARD)) < 1e-3
    assert variation(PRIOR, tilted(REWARD)) > 0.1


@pytest.mark.slow
def test_robust_dpo_withstands_flips_and_dpo_does_not():
    assert variation(converged("robust", 0.1, 0.1), tilted(REWARD)) < 1e-3
    assert variation(converged("dpo", 0.0, 0.1), tilted(REWARD)) > 0.01


@pytest.mark.slow
def test_ipo_reaches_its_own_optimum():
    mean = (PREFERS * (1 - np.eye(6))).sum(axis=1) / 6  # against itself a response wins and loses by a half
    own = tilted(mean)
    assert variation(converged("ipo", 0.0, 0.0, rate=0.5), own) < 1e-3
    assert variation(own, tilted(REWARD)) > 0.05
