"""The denoising loss with networks whose error is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion import process as processes
from research.errors import DataError, FlagError
from research.tasks import diffusion

ROWS, CLASSES = 6, 10
FLOW = processes.flow()
DATA = np.random.default_rng(0)
BATCH = {
    "images": DATA.uniform(-1, 1, (ROWS, 4, 4, 1)).astype(np.float32),
    "labels": np.arange(ROWS) % CLASSES,
    "weight": np.float32([1, 2, 1, 1, 3, 0]),
}


class Network:
    """As much of a flax module as the task calls: returns `gain` x + `offset`, and keeps what it was given."""

    def apply(self, variables, x, t, labels=None, text=None, rngs=None):
        self.seen = (x, t, labels if text is None else text, rngs)
        p = variables["params"]
        return p["gain"] * x + p["offset"] * jnp.ones_like(x)


VARIABLES = {"params": {"gain": jnp.float32(0.0), "offset": jnp.float32(0.0)}, "head": {}}


def make(**options):
    network = Network()
    options = {"kind": "flow", "classes": CLASSES, **options}
    return network, diffusion.loss(network, options.pop("process", FLOW), **options)


def test_the_loss_of_zero_is_the_mean_square_of_the_target():
    network, loss = make()
    rng = jax.random.key(0)
    big = {k: np.repeat(v, 300, axis=0) for k, v in BATCH.items()}
    out = jax.jit(lambda b, r: loss(VARIABLES, b, r)[:3])(big, rng)
    power = (BATCH["images"].astype(np.float64) ** 2).mean((1, 2, 3)) @ BATCH["weight"] / 8
    assert out[1] == 300 * 8
    np.testing.assert_allclose(out[0] / out[1], 1 + power, rtol=0.02)  # eps - x0, independent
    np.testing.assert_allclose(out[2]["mse"][0], out[0], rtol=1e-5)


def test_edm_weight_makes_the_loss_of_zero_one():
    std = float(np.sqrt((BATCH["images"] ** 2).mean()))
    _, loss = make(process=processes.edm(), kind="edm", weight="edm", times="log_normal", sigma_data=std)
    big = {k: np.repeat(v, 300, axis=0) for k, v in BATCH.items() if k != "weight"}
    out = jax.jit(lambda b, r: loss(VARIABLES, b, r).mean())(big, jax.random.key(1))
    np.testing.assert_allclose(out, 1, rtol=0.04)


def test_a_perfect_network_has_no_loss():
    """Images of zeros: v = alpha eps = alpha x / sigma."""
    process = processes.cosine()

    class Perfect:
        def apply(self, variables, x, t, labels, rngs=None):
            ratio = process.alpha(t) / process.sigma(t)
            return ratio[:, None, None, None] * x

    loss = diffusion.loss(Perfect(), process, "v", classes=CLASSES, weight="min_snr")
    out = loss(VARIABLES, BATCH | {"images": np.zeros((ROWS, 4, 4, 1))}, jax.random.key(0))
    assert out.mean() < 1e-8


def test_evaluation_is_fixed_and_drops_no_label():
    network, loss = make(label_dropout=1.0)
    a, first = loss(VARIABLES, BATCH, None), network.seen
    b = loss(VARIABLES, BATCH, None)
    assert a.sum == b.sum and a.weight == 8 and first[3] == {}
    np.testing.assert_array_equal(first[2], BATCH["labels"])
    assert len(np.unique(first[1])) == ROWS and first[1].min() > 0 and first[1].max() < 1
    padded = {k: np.concatenate([v, 0 * v[:2]]) for k, v in BATCH.items()}
    np.testing.assert_allclose(loss(VARIABLES, padded, None).sum, a.sum, rtol=1e-5)
    better = {"params": {"gain": jnp.float32(0.5), "offset": jnp.float32(0.0)}}
    assert loss(better, BATCH, None).mean() < a.mean()


def test_training_draws_anew_and_drops_labels():
    network, loss = make(label_dropout=0.1)
    big = {k: np.repeat(v, 1000, axis=0) for k, v in BATCH.items()}
    a = loss(VARIABLES, big, jax.random.key(0))
    t, labels = np.asarray(network.seen[1]), np.asarray(network.seen[2])
    assert set(network.seen[3]) == {"dropout"}
    dropped = labels == CLASSES
    assert abs(dropped.mean() - 0.1) < 0.015
    np.testing.assert_array_equal(labels[~dropped], big["labels"][~dropped])
    np.testing.assert_allclose(np.diff(np.sort(t)), 0.999 / len(t), atol=2e-6)  # low-discrepancy
    assert loss(VARIABLES, big, jax.random.key(1)).sum != a.sum
    assert loss(VARIABLES, big, jax.random.key(0)).sum == a.sum


def test_a_text_is_told_dropped_to_zeros_and_told_in_evaluation():
    big = {k: np.repeat(v, 300, axis=0) for k, v in BATCH.items() if k != "labels"}
    big["text"] = np.random.default_rng(1).normal(size=(300 * ROWS, 5)).astype(np.float32)
    network, loss = make(classes=0, label_dropout=0.1)
    loss(VARIABLES, big, jax.random.key(4))
    gone = np.asarray((network.seen[2] == 0).all(axis=1))
    assert 0.07 < gone.mean() < 0.13 and network.seen[2].shape == (300 * ROWS, 5)
    np.testing.assert_array_equal(network.seen[2][~gone], big["text"][~gone])
    loss(VARIABLES, big, None)
    np.testing.assert_array_equal(network.seen[2], big["text"])


def test_prior_preservation_is_the_mean_of_each_part():
    is_prior = np.array([0, 0, 1, 1, 1, 0, 1], bool)
    each = np.random.default_rng(1).uniform(size=7)
    w = diffusion.prior_weights(is_prior, 0.5)
    want = (each[~is_prior].mean() + 0.5 * each[is_prior].mean()) / 1.5
    np.testing.assert_allclose(each @ w / w.sum(), want, rtol=1e-6)
    np.testing.assert_allclose(w.sum(), 7, rtol=1e-6)
    np.testing.assert_allclose(diffusion.prior_weights(np.zeros(3, bool), 0.0), 1)
    np.testing.assert_allclose(diffusion.prior_weights(is_prior, 0.0)[is_prior], 0)
    for wrong, prior, words in ((np.ones(3, bool), 1.0, "instance"), (np.zeros(3, bool), 1.0, "prior images")):
        with pytest.raises(DataError, match=words):
            diffusion.prior_weights(wrong, prior)
    with pytest.raises(FlagError, match="prior=-1"):
        diffusion.prior_weights(is_prior, -1)


def test_what_is_refused():
    with pytest.raises(FlagError, match="label_dropout=2"):
        make(label_dropout=2)
    with pytest.raises(FlagError, match="ends at SNR 0"):
        make(kind="eps")
    with pytest.raises(FlagError, match="unknown times"):
        make(times="normal")
