"""Classification of sentences and images: a linear head on the model's features."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.param import dropout
from research.tasks.loss import Loss, cross_entropy, model_variables


def init_head(rng: jax.Array, features: int, classes: int, bias: bool = True) -> dict[str, jax.Array]:
    """kernel [D, C] from N(0, 0.02^2) (BERT's own), bias [C] zeros; a decoder's head has none where it shall export as
    a Hugging Face model.
    """
    kernel = {"kernel": 0.02 * jax.random.normal(rng, (features, classes))}
    return kernel | ({"bias": jnp.zeros(classes)} if bias else {})


def logits(model: nn.Module, variables: dict, batch: dict, rng: jax.Array | None = None) -> jax.Array:
    """batch {"tokens", "mask"} [B, T] or {"images"} [B, H, W, C] -> [B, C] fp32."""
    model_rng, head_rng = (None, None) if rng is None else jax.random.split(rng)
    rngs = {} if rng is None else {"dropout": model_rng}
    inputs = (batch["images"],) if "images" in batch else (batch["tokens"], batch["mask"])
    x = model.apply(model_variables(variables), *inputs, method="features", rngs=rngs)
    x = dropout(x.astype(jnp.float32), getattr(model.config, "dropout", 0.0), head_rng)
    return x @ variables["head"]["kernel"] + variables["head"].get("bias", 0.0)


def loss(model: nn.Module) -> Callable[[dict, dict, jax.Array | None], Loss]:
    """Cross-entropy in nats, and accuracy.

    batch: tokens, mask int [B, T] or images [B, H, W, C]; labels int [B], or [B, C] that sum to 1 (mixed images: the
    likeliest counts as right); weight [B] (0 for a row that only pads the batch).
    """

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        z, labels = logits(model, variables, batch, rng), batch["labels"]
        weight = batch.get("weight", jnp.ones(labels.shape[:1])).astype(jnp.float32)
        soft = labels.ndim == 2
        total, right = jnp.sum(weight), jnp.argmax(labels, axis=-1) if soft else labels
        correct = (jnp.argmax(z, axis=-1) == right) * weight
        each = -jnp.sum(labels * jax.nn.log_softmax(z), axis=-1) if soft else cross_entropy(z, labels)
        nats = jnp.sum(each * weight)
        return Loss(nats, total, {"accuracy": (jnp.sum(correct), total)}, (z, weight))

    return fn
