"""Sequence to sequence: predict the target's tokens from the source and the target's earlier ones."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.tasks.loss import Loss, cross_entropy, model_variables


def loss(model: nn.Module) -> Callable[[dict, dict, jax.Array | None], Loss]:
    """Cross-entropy in nats a target token, of an encoder-decoder.

    batch: tokens, mask int [B, T] of the source; targets, target_mask int [B, T'], padded on the right, the end token
    included. The decoder reads them shifted right behind its start token.
    """

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        rngs = {} if rng is None else {"dropout": rng}
        targets, mask = batch["targets"], batch["target_mask"]
        read = shifted(targets, model.config.start_token_id)
        given = (batch["tokens"], batch["mask"], read, jnp.pad(mask[:, :-1], ((0, 0), (1, 0)), constant_values=1))
        z = model.apply(model_variables(variables), *given, method="logits", rngs=rngs)
        weight = mask.astype(jnp.float32)
        nats = jnp.sum(cross_entropy(z, targets) * weight)
        correct = jnp.sum((jnp.argmax(z, axis=-1) == targets) * weight)
        return Loss(nats, jnp.sum(weight), {"accuracy": (correct, jnp.sum(weight))}, (z, weight))

    return fn


def shifted(targets: jax.Array, start: int) -> jax.Array:
    """targets int [B, T'] -> the decoder's input: the start token, then all but the last."""
    return jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=start)
