import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import DataError, FlagError
from research.rl import advantages as a
from research.rl import kl, pairs, rewards

REWARDS, VALUES = jnp.asarray([[0.0, 0, 1]]), jnp.asarray([[0.5, 0.6, 0.7]])


@pytest.mark.parametrize(
    "gamma,lam,want",
    [
        (1.0, 0.95, [0.46575, 0.385, 0.3]),
        (0.99, 0.9, [0.4150273, 0.3603, 0.3]),
        (1.0, 1.0, [0.5, 0.4, 0.3]),
        (1.0, 0.0, [0.1, 0.1, 0.3]),
    ],
)
def test_golden_gae(gamma, lam, want):
    found, returns = a.gae(REWARDS, VALUES, jnp.ones((1, 3)), gamma, lam)
    np.testing.assert_allclose(found[0], want, rtol=1e-5)
    np.testing.assert_allclose(returns, found + VALUES, rtol=1e-6)


def test_gae_carries_past_masked_tokens():
    put = lambda x, fill: jnp.insert(x, jnp.asarray([0, 1, 3]), fill, axis=1)  # noqa: E731
    mask = put(jnp.ones((1, 3)), 0.0)
    found, _ = a.gae(put(REWARDS, jnp.nan), put(VALUES, 7.0), mask)
    np.testing.assert_allclose(found[mask > 0], [0.46575, 0.385, 0.3], rtol=1e-5)
    assert not found[mask == 0].any()


def test_golden_whitening():
    x, mask = jnp.asarray([1.0, 2, 3, 9]), jnp.asarray([1, 1, 1, 0])
    np.testing.assert_allclose(a.whiten(x, mask), [-1.224744862, 0, 1.224744862, 0], atol=1e-6)
    np.testing.assert_allclose(a.whiten(x, mask, bessel=True), [-1, 0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(a.whiten(x, mask, shift=False), [0.775255138, 2, 3.224744862, 0], atol=1e-6)
    square = jnp.arange(1.2, 2.05, 0.1).reshape(3, 3)
    np.testing.assert_allclose(a.whiten(square, jnp.ones((3, 3)), shift=False)[0], [0.0508, 0.4381, 0.8254], atol=1e-4)
    assert np.isfinite(a.whiten(x, jnp.asarray([1, 0, 0, 0]), bessel=True)).all()


def test_golden_groups():
    r = jnp.asarray([[1.0, 0, 0, 1], [2, 2, 2, 2]])
    signs = np.asarray([[1, -1, -1, 1], [0, 0, 0, 0]])
    for name, size in {"group": 0.865875430, "centred": 0.5, "leave_one_out": 2 / 3}.items():
        np.testing.assert_allclose(a.GROUP[name](r), size * signs, rtol=1e-6, err_msg=name)
    everywhere = a.GROUP["global"](r)
    np.testing.assert_allclose(everywhere, (r - 1.25) / (np.std(r, ddof=1) + 1e-4), rtol=1e-5)
    assert a.teaches(r).tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", a.GROUP)
def test_a_reward_that_could_not_be_given_leaves_the_group(name):
    r = jnp.asarray([[1.0, np.nan, 4, 2]])
    found = a.GROUP[name](r)
    np.testing.assert_allclose(found[:, [0, 2, 3]], a.GROUP[name](r[:, [0, 2, 3]]), rtol=1e-5)
    assert float(found[0, 1]) == 0
    assert not a.GROUP[name](jnp.full((1, 3), jnp.nan)).any() and not a.GROUP[name](jnp.ones((1, 1))).any()


def test_overlong_is_capped():
    np.testing.assert_allclose(a.overlong(jnp.asarray([10, 80, 90, 100, 150]), 100, 20), [0, 0, -0.5, -1, -1])


def test_golden_shaped_reward():
    logps, reference = jnp.asarray([[-1.0, -2, -0.5, 3]]), jnp.asarray([[-1.2, -1.5, -0.9, np.nan]])
    mask, score = jnp.asarray([[1, 1, 1, 0]]), jnp.asarray([1.5])
    np.testing.assert_allclose(kl.shaped(logps, reference, mask, score, 0.1)[0], [-0.02, 0.05, 1.46, 0], atol=1e-6)
    cut = kl.shaped(logps, reference, mask, score, 0.0, jnp.asarray([False]), 1.0)
    np.testing.assert_allclose(cut[0], [0, 0, 0.5, 0], atol=1e-6)
    assert not kl.shaped(logps, logps, mask * 0, score, 0.1).any(), "an empty completion gets no score"


def test_controllers():
    assert kl.Adaptive(0.15).update(12.0, 64).coef == pytest.approx(0.150192)
    assert kl.Adaptive(0.15).update(6.0, 64).coef == 0.15
    assert kl.Adaptive(0.15).update(-5.0, 64).coef == pytest.approx(0.15 * (1 - 0.2 * 0.0064))
    assert kl.Adaptive(0.15).update(float("nan"), 64) == kl.Adaptive(0.15)
    assert kl.Fixed(0.1).update(12.0, 64).coef == 0.1
    with pytest.raises(FlagError, match="coef"):
        kl.Fixed(-1.0)
    with pytest.raises(FlagError, match="target"):
        kl.Adaptive(0.1, target=0.0)


def test_rewards_are_weighted_and_holes_counted():
    functions = {"length": lambda ps, cs: [len(c) for c in cs], "odd": lambda ps, cs: [None, 1.0, float("nan")]}
    out = rewards.score(functions, ["", "", ""], ["a", "bb", "ccc"], {"odd": 0.5})
    assert out.total.tolist() == [1, 2.5, 3] and out.unscored == {"length": 0, "odd": 2}
    nothing = rewards.score({"odd": functions["odd"]}, ["", "", ""], ["a", "bb", "ccc"])
    assert np.isnan(nothing.total).tolist() == [True, False, True]
    with pytest.raises(DataError, match="gave 3 values for 1"):
        rewards.score({"odd": functions["odd"]}, [""], ["a"])
    with pytest.raises(FlagError, match="none"):
        rewards.score(functions, [""], ["a"], {"none": 1.0})


def test_best_of_n():
    for n, want in {2: 0.193147, 4: 0.636294, 16: 1.835089, 64: 3.174508}.items():
        assert rewards.best_of_kl(n) == pytest.approx(want, abs=1e-6)
    assert rewards.best_of(np.asarray([[np.nan, 1, 3], [2, np.nan, np.nan]])).tolist() == [2, 0]
    pool = np.asarray([3.0, 1, 2, 2])
    assert rewards.expected_best(pool, 1) == pytest.approx(2) and rewards.expected_best(pool, 4) == 3
    subsets = [max(pool[i], pool[j]) for i in range(4) for j in range(i)]
    assert rewards.expected_best(pool, 2) == pytest.approx(np.mean(subsets))
    pool, judged = np.asarray([3.0, 1, 2, 4]), np.asarray([0.0, 1.0, 1.0, 0.0])
    chosen = [judged[max((i, j), key=lambda k: pool[k])] for i in range(4) for j in range(i)]
    assert rewards.expected_best(pool, 2, judged) == pytest.approx(np.mean(chosen)) != np.mean(judged)
    with pytest.raises(FlagError, match="best of 5"):
        rewards.expected_best(pool, 5)


def test_kl_of_best_of_n_by_enumeration():
    """Best of 2 over equal chances without ties: p_i = (2 i + 1) / K^2. Its KL stays below the bound and nears it."""
    gaps = []
    for k in (4, 400):
        p = (2 * np.arange(k) + 1) / k**2
        gaps.append(rewards.best_of_kl(2) - p @ np.log(p * k))
    assert 0 < gaps[1] < 1e-4 < gaps[0]


def test_pairs():
    best, worst, differ = pairs.best_and_worst(np.asarray([[1.0, 3, np.nan, 2], [2, 2, 2, 2]]))
    assert (best[0], worst[0], differ.tolist()) == (1, 0, [True, False])
    best, worst, differ = pairs.ranked(np.asarray([[1.0, 3, np.nan, 2, 0], [2, 2, 2, 2, 2]]), 3)
    assert [best[0].tolist()[:2], worst[0].tolist()[:2]] == [[1, 3], [4, 0]]
    assert differ.tolist() == [[True, True, False], [False] * 3], "two pairs of four scores, none of equal ones"
    assert all(pairs.rotate(n)[i] != i for n in (2, 3, 5) for i in range(n))
    assert pairs.bradley_terry(1.0, 1.0) == 0.5 and pairs.bradley_terry(2.0, 1.0) == pytest.approx(0.731058579)
