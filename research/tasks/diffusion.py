"""Denoising: predict the target of a parameterisation at a random time (2006.11239, 2206.00364, 2209.03003).

    x_t = alpha x0 + sigma eps,   loss = w(t) mean over the image of |target - network(x_t, t, label)|^2

The network is told what the batch has: labels, texts as vectors, or nothing. Training draws t and eps, and tells some
rows nothing, by the null label or a vector of zeros, for classifier-free guidance (2207.12598). Evaluation (no rng)
takes fixed times and noise for each row and tells all: its loss can be compared between steps, where the training loss
is mostly noise.

Prior preservation (DreamBooth, 2208.12242 eq. 2) is `mean over instances + lambda mean over prior images`: it needs
nothing but weights of the rows, which `prior_weights` gives.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.diffusion import weights
from research.diffusion.parameterise import parameterisation
from research.diffusion.process import Process, wide
from research.errors import DataError, FlagError
from research.tasks.loss import Loss, model_variables

EVALUATION = 20260101  # the seed of the noise of evaluation


def loss(
    model: nn.Module,
    process: Process,
    kind: str = "v",
    *,
    classes: int,
    weight: str = "uniform",
    gamma: float = 5.0,
    times: str = "uniform",
    low_discrepancy: bool = True,
    label_dropout: float = 0.1,
    sigma_data: float = 0.5,
) -> Callable[[dict, dict, jax.Array | None], Loss]:
    """batch: images float [B, H, W, C] in [-1, 1], weight [B] (0 for a row that only pads the batch); labels int [B] or
    text float [B, E] where the model is told one of them.

    Args:
        kind: what the network predicts, `parameterise.KINDS`.
        classes: the number of labels, and the null label; 0 for a model without.
        weight, gamma: `weights.WEIGHTS`, and min-SNR's bound.
        times, low_discrepancy: `weights.TIMES`, and whether the times of a batch are spread evenly.
        label_dropout: probability that a row is told nothing in training.
        sigma_data: standard deviation of the data, for kind and weight edm.

    The metric `mse` is the loss without w(t). Raises FlagError: an unknown name, a probability outside [0, 1], a kind
    that the process refuses.
    """
    if not 0 <= label_dropout <= 1:
        raise FlagError(f"label_dropout={label_dropout} must lie in [0, 1]")
    p = parameterisation(kind, process, sigma_data)
    weigh = weights.weight(weight, process, p, gamma, sigma_data)
    quantile = weights.quantile(times, process)

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        x0 = batch["images"].astype(jnp.float32)
        told = {name: batch[name] for name in ("labels", "text") if name in batch}
        noise_rng, time_rng, label_rng, model_rng = (
            (jax.random.key(EVALUATION), None, None, None) if rng is None else jax.random.split(rng, 4)
        )
        t = quantile(weights.draw(time_rng, len(x0), low_discrepancy))
        # A key a row, so that a row's noise does not depend on how many rows pad the batch.
        keys = jax.vmap(lambda i: jax.random.fold_in(noise_rng, i))(jnp.arange(len(x0)))
        eps = jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:]))(keys)
        if label_rng is not None and label_dropout:
            gone, null = jax.random.bernoulli(label_rng, label_dropout, x0.shape[:1]), {"labels": classes, "text": 0}
            told = {name: jnp.where(wide(gone, leaf), null[name], leaf) for name, leaf in told.items()}

        a, s = wide(process.alpha(t), x0), wide(process.sigma(t), x0)
        x = p.scale(a, s) * process.noised(x0, eps, t)
        rngs = {} if model_rng is None else {"dropout": model_rng}
        out = model.apply(model_variables(variables), x, process.condition(t), **told, rngs=rngs)
        error = jnp.mean((out.astype(jnp.float32) - p.target(x0, eps, a, s)) ** 2, axis=tuple(range(1, x0.ndim)))
        rows = batch.get("weight", jnp.ones(x0.shape[:1])).astype(jnp.float32)
        total = jnp.sum(rows)
        return Loss(jnp.sum(weigh(t) * error * rows), total, {"mse": (jnp.sum(error * rows), total)})

    return fn


def prior_weights(is_prior: np.ndarray, prior: float = 1.0) -> np.ndarray:
    """Row weights [B] fp32 for a batch of instance and prior images, marked by is_prior bool [B].

    With these the loss is `(mean over instances + prior * mean over prior images) / (1 + prior)`: each half has its own
    mean, however many rows it has. The divisor scales every gradient alike. The prior images are drawn from the frozen
    model, which is the model applied without `peft`. Weights add up to B, so that batches count by their rows.

    Raises FlagError: a negative weight; DataError: a batch without instances, or without the prior images it asks for.
    """
    if not (np.isfinite(prior) and prior >= 0):
        raise FlagError(f"prior={prior} must be a finite number of at least 0")
    is_prior = np.asarray(is_prior, bool)
    priors, instances = int(is_prior.sum()), int((~is_prior).sum())
    if not instances:
        raise DataError("a batch of prior images alone: it needs at least one instance image")
    if prior and not priors:
        raise DataError(f"prior={prior:g} needs prior images in every batch: this one has none")
    share = np.where(is_prior, prior / max(priors, 1), 1 / instances)
    return (share * len(is_prior) / (1 + prior)).astype(np.float32)
