"""Language modelling: predict the next token."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.tasks.loss import Loss, cross_entropy, model_variables


def loss(model: nn.Module) -> Callable[[dict, dict, jax.Array | None], Loss]:
    """Cross-entropy in nats a token.

    batch: tokens, mask int [B, T]; optional loss_mask [B, T] marks the tokens to predict (default: every real one but
    the first).
    """

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        rngs = {} if rng is None else {"dropout": rng}
        z = model.apply(model_variables(variables), batch["tokens"], batch["mask"], method="logits", rngs=rngs)
        weight = (batch["mask"][:, :-1] * batch.get("loss_mask", batch["mask"])[:, 1:]).astype(jnp.float32)
        nats = jnp.sum(cross_entropy(z[:, :-1], batch["tokens"][:, 1:]) * weight)
        return Loss(nats, jnp.sum(weight), {}, (z[:, :-1], weight))

    return fn
