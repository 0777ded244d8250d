"""Hand values, step 0, reductions, and gradients by enumeration of every group of samples."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError
from research.rl import advantages
from research.tasks import divergence
from research.tasks import policy as p
from research.tasks.policy import VARIANTS, Variant

NEW, OLD = jnp.asarray([[-1.0, -2, -0.5, -1]]), jnp.asarray([[-1.5, -1.5, -0.5, -1.1]])
ADVANTAGE, ONES = jnp.asarray([[1.0, 1, -1, -2]]), jnp.ones((1, 4))


def test_golden_clip():
    ratio = jnp.exp(p.log_ratio(NEW, OLD, ONES, "token"))
    np.testing.assert_allclose(ratio[0], [1.648721, 0.606531, 1, 1.105171], rtol=1e-6)
    each = p.surrogate(VARIANTS["ppo"], NEW, ratio, ADVANTAGE)
    np.testing.assert_allclose(each[0], [-1.2, -0.606531, 1, 2.210342], rtol=1e-6)
    np.testing.assert_allclose(p.surrogate(VARIANTS["dapo"], NEW, ratio, ADVANTAGE)[0, 0], -1.28, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(p.log_ratio(NEW, OLD, ONES, "sequence")), 1.025315121, rtol=1e-6)
    out = p.policy_loss(VARIANTS["ppo"], NEW, ADVANTAGE, ONES, old=OLD)
    np.testing.assert_allclose(out.mean(), 0.350952794, rtol=1e-6)
    assert [float(x) for x in out.metrics["clip_fraction"]] == [1, 4]
    dual = Variant("gae", dual_clip=3.0)
    assert float(p.surrogate(dual, jnp.zeros(1), jnp.full(1, 5.0), -jnp.ones(1))[0]) == 3


@pytest.mark.slow
def test_golden_value_clip():
    one = lambda x: jnp.full((1, 1), x)  # noqa: E731
    clipped = p.value_loss(one(1.0), one(1.2), one(1.0), one(0.5), 0.2)
    np.testing.assert_allclose(clipped.mean(), 0.125, rtol=1e-5)
    assert float(clipped.metrics["value/clip_fraction"][0]) == 1
    np.testing.assert_allclose(p.value_loss(one(1.0), one(1.2), one(1.0), one(0.5), None).mean(), 0.02, rtol=1e-5)
    values = jnp.asarray([[1.0, 2, 9]])
    out = p.value_loss(values, jnp.asarray([[1.0, 2, 3]]), jnp.asarray([[1, 1, 0]]))
    assert float(out.metrics["explained_variance"][0] / out.weight) == 1 and float(out.sum) == 0


def test_golden_reductions():
    losses, mask = jnp.asarray([[1.0, 2, 3, 4], [10, 20, np.nan, np.nan]]), jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]])
    mean = lambda how, length=1, m=mask: np.divide(*p.reduce(losses, m, how, length))  # noqa: E731
    assert (mean("sequence"), mean("constant", 8)) == (8.75, 2.5)
    np.testing.assert_allclose(mean("token"), 40 / 6, rtol=1e-6)
    first = mask.at[1].set(0)
    assert (mean("sequence", m=first), mean("token", m=first)) == (2.5, 2.5), "an empty row is no row"


def test_golden_divergence():
    logps, reference = jnp.asarray([-1.0, -2, -0.5]), jnp.asarray([-1.2, -1.5, -0.9])
    np.testing.assert_allclose(divergence.k1(logps, reference), [0.2, -0.5, 0.4], rtol=1e-5)
    np.testing.assert_allclose(divergence.k2(logps, reference), [0.02, 0.125, 0.08], rtol=1e-5)
    np.testing.assert_allclose(divergence.k3(logps, reference), [0.018730753, 0.148721271, 0.070320046], rtol=1e-5)
    a, b = jnp.log(jnp.asarray([0.5, 0.3, 0.2])), jnp.log(jnp.asarray([0.4, 0.4, 0.2]))
    np.testing.assert_allclose(divergence.exact(a + 3, b), 0.025267154, rtol=1e-5)
    for name, want in {"k1": 0.025267154, "k2": 0.024862407, "k3": 0.025267154}.items():
        np.testing.assert_allclose(jnp.exp(a) @ divergence.ESTIMATORS[name](a, b), want, rtol=1e-4)


def data(rows: int = 4, length: int = 5) -> dict:
    rng = np.random.default_rng(0)
    mask = (np.arange(length) < np.asarray([5, 2, 3, 1])[:rows, None]).astype(np.float32)
    draw = lambda: np.where(mask, -rng.uniform(0.1, 1.5, (rows, length)), np.nan).astype(np.float32)  # noqa: E731
    keys = ("logps", "old", "reference", "sampler", "entropy")
    return {k: draw() for k in keys} | {"mask": mask, "advantages": rng.normal(size=rows).astype(np.float32)}


@functools.cache
def gradient(name: str):
    v = dataclasses.replace(
        VARIANTS[name], kl_coef=0.1, entropy_coef=0.01, importance_cap=1.5, dual_clip=3.0, clip_low=0.1, clip_high=0.1
    )

    def total(logps, batch):
        out = p.policy_loss(v, logps, batch["advantages"], batch["mask"], **{k: batch[k] for k in WITH})
        return out.sum, out._replace(outputs=None)

    return jax.jit(jax.grad(total, has_aux=True))


WITH = ("old", "reference", "sampler", "entropy")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batches_add_up_to_the_batch(name):
    batch = data()
    run = lambda part: gradient(name)(batch["logps"][part], {k: v[part] for k, v in batch.items()})  # noqa: E731
    grads, whole = run(slice(0, 4))
    parts = [run(slice(0, 2)), run(slice(2, 4))]
    np.testing.assert_allclose(np.concatenate([g for g, _ in parts]), grads, atol=1e-6)
    added = jax.tree.map(lambda a, b: a + b, parts[0][1], parts[1][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), added, whole)
    assert np.isfinite(grads).all() and not grads[batch["mask"] == 0].any(), "what is masked leaks nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_step_zero_is_reinforce(name):
    batch, v = data(), VARIANTS[name]
    loss = lambda x, v: p.policy_loss(v, x, batch["advantages"], batch["mask"])  # noqa: E731
    out = loss(batch["logps"], v)
    assert float(out.metrics["ratio_mean"][0] / out.metrics["ratio_mean"][1]) == 1
    assert float(out.metrics["clip_fraction"][0]) == 0 and float(out.metrics["approx_kl"][0]) == 0
    plain = dataclasses.replace(v, surrogate="reinforce")
    got, want = (jax.grad(lambda x, v=v: loss(x, v).sum)(batch["logps"]) for v in (v, plain))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_sequence_ratio_clips_whole_rows():
    batch = data()
    grads = jax.grad(lambda x: p.policy_loss(VARIANTS["gspo"], x, jnp.ones(4), batch["mask"], old=batch["old"]).sum)(
        batch["logps"]
    )
    raised = np.nansum(batch["logps"] - batch["old"], axis=1) > 0
    assert raised.any() and not raised.all()
    assert not grads[raised].any() and (np.abs(grads[~raised]).sum(axis=1) > 0).all()


def test_truncated_importance_weights():
    v = Variant("gae", importance_cap=2.0)
    out = p.policy_loss(v, NEW, jnp.ones((1, 4)), ONES, old=NEW, sampler=NEW - jnp.log(jnp.asarray([[1.5, 4, 1, 1]])))
    np.testing.assert_allclose(out.sum, -(1.5 + 2 + 1 + 1), rtol=1e-5)


@functools.cache
def expected_gradients(groups: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The gradient of the expected reward, and the mean over all groups of each estimator's."""
    reward, theta = jnp.asarray([1.0, -0.5, 0.3, 2.0]), jnp.asarray([0.2, -0.3, 0.5, -0.1])
    picks = jnp.asarray(list(itertools.product(range(4), repeat=groups)))
    chance = jnp.prod(jax.nn.softmax(theta)[picks], axis=1)
    true = jax.grad(lambda t: jax.nn.softmax(t) @ reward)(theta)

    def estimate(t, name, kind):
        logps = jax.nn.log_softmax(t)[picks].reshape(-1, 1)
        adv = advantages.GROUP[kind](reward[picks]).reshape(-1)
        v = dataclasses.replace(VARIANTS[name], length=1)
        out = p.policy_loss(v, logps, adv, jnp.ones_like(logps), weight=jnp.repeat(chance, groups))
        return -out.sum / out.weight

    names = {"rloo": "leave_one_out", "dr_grpo": "centred", "grpo": "group"}
    return np.asarray(true), {n: np.asarray(jax.grad(estimate)(theta, n, kind)) for n, kind in names.items()}


@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 3])
def test_rloo_is_unbiased_and_dr_grpo_short_by_one_sample(groups):
    true, found = expected_gradients(groups)
    np.testing.assert_allclose(found["rloo"], true, atol=1e-6)
    np.testing.assert_allclose(found["dr_grpo"], (groups - 1) / groups * true, atol=1e-6)
    ratios = found["grpo"] / true
    assert ratios.max() - ratios.min() > 0.1, "dividing by the deviation changes the direction"


@pytest.mark.slow
def test_regularised_gradient_reaches_the_closed_form():
    """Exact expectation: every response is one row, weighted by its probability."""
    reward, prior, beta = jnp.asarray([1.0, 0.2, -0.5, 0.7]), jnp.asarray([0.1, 0.4, 0.3, 0.2]), 0.5
    v = Variant("centred", surrogate="reinforce")

    def loss(theta):
        logps = jax.nn.log_softmax(theta)
        advantage = reward - beta * (jax.lax.stop_gradient(logps) - jnp.log(prior))
        weight = jax.lax.stop_gradient(jnp.exp(logps))
        return p.policy_loss(v, logps[:, None], advantage, jnp.ones((4, 1)), weight=weight).sum

    ascend = jax.jit(lambda t: jax.lax.fori_loop(0, 3000, lambda _, t: t - jax.grad(loss)(t), t))
    found = jax.nn.softmax(ascend(jnp.log(prior)))
    want = prior * jnp.exp(reward / beta)
    assert 0.5 * float(jnp.abs(found - want / want.sum()).sum()) < 1e-3


@pytest.mark.slow
def test_gradients_of_kl_estimators():
    """Samples of the policy: k2 gives grad KL(policy || reference), k3 grad KL(reference || policy), k1 0."""
    theta, q = jnp.asarray([0.3, -0.2, 0.6]), jnp.log(jnp.asarray([0.2, 0.5, 0.3]))
    chance = jax.nn.softmax(theta)
    log = jax.nn.log_softmax
    estimator = lambda k: jax.grad(lambda t: chance @ divergence.ESTIMATORS[k](log(t), q))(theta)  # noqa: E731
    np.testing.assert_allclose(estimator("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(estimator("k2"), jax.grad(lambda t: divergence.exact(t, q))(theta), atol=1e-6)
    np.testing.assert_allclose(estimator("k3"), jax.grad(lambda t: divergence.exact(q, t))(theta), atol=1e-6)


def test_value_is_added_with_its_coefficient():
    policy = p.policy_loss(VARIANTS["ppo"], NEW, ADVANTAGE, ONES, old=OLD)
    value = p.value_loss(NEW, OLD, ONES)
    np.testing.assert_allclose(p.add(policy, value, 0.3).mean(), policy.mean() + 0.3 * value.mean(), rtol=1e-6)


def test_refuses():
    with pytest.raises(FlagError, match="Did you mean 'grpo'"):
        p.variant("grp")
    with pytest.raises(FlagError, match="reduction"):
        Variant("gae", reduction="tokens")
    with pytest.raises(FlagError, match="dual_clip"):
        Variant("gae", dual_clip=1.0)
    with pytest.raises(FlagError, match="kl_coef"):
        p.policy_loss(Variant("gae", kl_coef=0.1), NEW, ADVANTAGE, ONES)
