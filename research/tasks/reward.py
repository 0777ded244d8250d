"""Reward models: Bradley-Terry on scores of two completions (arXiv 2203.02155, section 3.5).

    -t log s(R_w - R_l - margin) - (1 - t) log s(R_l - R_w + margin) + centre (R_w + R_l)^2

t is 1, or the share of raters that prefer the chosen one; the last term (arXiv 2312.09244) fixes the free constant. A
score is linear in the model's feature of the last real token, on whichever side the padding is.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.tasks.loss import Loss, model_variables


def init_head(rng: jax.Array, features: int) -> dict[str, jax.Array]:
    """kernel [D, 1] from N(0, 1 / (D + 1)) (arXiv 2009.01325, appendix), bias [1] of zeros."""
    kernel = jax.random.normal(rng, (features, 1)) / jnp.sqrt(features + 1)
    return {"kernel": kernel, "bias": jnp.zeros(1)}


def scores(model: nn.Module, variables: dict, batch: dict, rng: jax.Array | None = None) -> jax.Array:
    """batch {"tokens", "mask"} [B, T] -> [B] fp32."""
    rngs = {} if rng is None else {"dropout": rng}
    x = model.apply(model_variables(variables), batch["tokens"], batch["mask"], method="features", rngs=rngs)
    head = variables["head"]
    return (x.astype(jnp.float32) @ head["kernel"] + head.get("bias", 0.0))[:, 0]


def bradley_terry(
    chosen: jax.Array,
    rejected: jax.Array,
    margin: jax.Array | float = 0.0,
    target: jax.Array | float = 1.0,
    centre: float = 0.0,
    weight: jax.Array | None = None,
) -> Loss:
    """Mean over pairs. chosen, rejected scores [B]; margin, target, weight [B] or numbers.

    The accuracy takes a target below a half for the other order; a tie of scores is wrong, one of targets not counted.
    """
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    weight = jnp.ones_like(chosen) if weight is None else weight.astype(jnp.float32)
    target = jnp.broadcast_to(jnp.asarray(target, jnp.float32), chosen.shape)
    d = chosen - rejected - margin
    each = -target * jax.nn.log_sigmoid(d) - (1 - target) * jax.nn.log_sigmoid(-d)
    each = each + centre * jnp.square(chosen + rejected)
    total, decided = jnp.sum(weight), weight * (target != 0.5)
    right = jnp.where(target > 0.5, chosen > rejected, chosen < rejected)
    mean = lambda x: (jnp.sum(jax.lax.stop_gradient(x) * weight), total)  # noqa: E731
    metrics = {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(chosen - rejected),
        "rewards/accuracies": (jnp.sum(right * decided), jnp.sum(decided)),
    }
    return Loss(jnp.sum(each * weight), total, metrics)


def loss(model: nn.Module, centre: float = 0.0) -> Callable[[dict, dict, jax.Array | None], Loss]:
    """batch: chosen, rejected {"tokens", "mask"} [B, T] of one width; optional margin, target, weight [B]."""

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        pair = batch["chosen"], batch["rejected"]
        both = {k: jnp.concatenate([side[k] for side in pair]) for k in ("tokens", "mask")}
        chosen, rejected = jnp.split(scores(model, variables, both, rng), 2)
        options = {"margin": batch.get("margin", 0.0), "target": batch.get("target", 1.0)}
        return bradley_terry(chosen, rejected, centre=centre, weight=batch.get("weight"), **options)

    return fn


def normalise(head: dict[str, jax.Array], reference: jax.Array) -> dict[str, jax.Array]:
    """The head whose scores on the reference samples, now [N], have mean 0 and standard deviation 1."""
    gain = 1 / jnp.maximum(jnp.std(reference), 1e-8)
    return {"kernel": head["kernel"] * gain, "bias": (head.get("bias", jnp.zeros(1)) - jnp.mean(reference)) * gain}
