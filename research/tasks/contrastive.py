"""Pairs of images and texts: the symmetric InfoNCE loss (CLIP, arXiv 2103.00020, figure 3); classes named by prompts.

z = s i t',    loss = (cross-entropy of z's rows + of its columns) / 2,    the diagonal is right
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.data.tokenize import encode
from research.errors import DataError
from research.tasks.loss import Loss, model_variables

MOST = math.log(100.0)  # of the logit scale, section 2.5
TEMPLATES = ("a photo of a {}.",)


def info_nce(images: jax.Array, texts: jax.Array, log_scale: jax.Array, weight: jax.Array | None = None) -> Loss:
    """Sum over pairs, in nats. images, texts unit vectors [B, E], row for row a pair; log_scale []; weight [B].

    A pair of weight 0 only pads the batch: it is nobody's negative either. N pairs that all look alike give ln N. The
    negatives are the batch's: sharded over devices it is the same loss, in micro-batches it is another, with fewer.
    """
    # No more than 100, and a scale that is above it still has a gradient to come back by.
    log_scale = log_scale + jax.lax.stop_gradient(jnp.minimum(log_scale, MOST) - log_scale)
    weight = jnp.ones(images.shape[0]) if weight is None else weight.astype(jnp.float32)
    z, real = jnp.exp(log_scale) * images @ texts.T, weight > 0
    least = jnp.finfo(jnp.float32).min
    rows, columns = jnp.where(real[None, :], z, least), jnp.where(real[:, None], z, least)
    pair = jnp.diagonal(z)
    each = (jax.nn.logsumexp(rows, axis=1) + jax.nn.logsumexp(columns, axis=0)) / 2 - pair
    total, index = jnp.sum(weight), jnp.arange(z.shape[0])
    mean = lambda right: (jnp.sum(right * weight), total)  # noqa: E731
    metrics = {
        "accuracy/text": mean(jnp.argmax(rows, axis=1) == index),  # which text belongs to the image
        "accuracy/image": mean(jnp.argmax(columns, axis=0) == index),
        "logit_scale": mean(jnp.exp(jax.lax.stop_gradient(log_scale))),
    }
    return Loss(jnp.sum(jnp.where(real, each, 0.0) * weight), total, metrics)


def loss(model: nn.Module) -> Callable[[dict, dict, jax.Array | None], Loss]:
    """batch: images float [B, H, W, C], tokens, mask int [B, T]; optional weight [B]."""

    def both(clip: nn.Module, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        return clip.features(batch["images"]), clip.texts(batch["tokens"], batch["mask"]), clip.scale()

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        rngs = {} if rng is None else {"dropout": rng}
        found = model.apply(model_variables(variables), batch, method=both, rngs=rngs)
        return info_nce(*found, batch.get("weight"))

    return fn


def zero_shot(
    model: nn.Module, variables: dict, tokenizer: Any, classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> dict[str, jax.Array]:
    """A head that no image has trained: kernel [E, C], whose columns are the classes' texts times the logit scale.

    Several templates are an ensemble: the mean of their unit vectors, made a unit vector (section 3.1.4). With it as
    `variables["head"]`, `classify.logits` is zero-shot classification, and training starts from there.
    Raises DataError: no classes, or a template without a place for the name.
    """
    if not classes or any("{}" not in template for template in templates) or not templates:
        raise DataError(f"zero-shot classes need names and templates with {{}}: {list(classes)}, {list(templates)}.")
    prompts = [template.format(name) for name in classes for template in templates]
    longest = model.config.text.max_positions
    given = encode(tokenizer, prompts, longest)
    width = int(given["mask"].sum(axis=1).max())

    @jax.jit
    def run(variables: dict, *given: jax.Array) -> tuple[jax.Array, jax.Array]:
        return model.apply(variables, *given, method=lambda clip, *x: (clip.texts(*x), clip.scale()))

    texts, scale = run(model_variables(variables), *(given[name][:, :width] for name in ("tokens", "mask")))
    mean = jnp.mean(texts.reshape(len(classes), len(templates), -1), axis=1)
    mean /= jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return {"kernel": jnp.exp(scale) * mean.T}
