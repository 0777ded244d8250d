"""Language modelling: predict the next token."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.tasks.loss import Loss, cross_entropy, model_variables


def loss(model: nn.Module) -> Callable[[dict, dict, jax.Array | None], Loss]:
    """Cross-entropy in nats a token.

    batch: tokens, mask int [B, T]; optional loss_mask [B, T] marks the tokens to predict (default: every real one but
    the first); optional segments int [B, T], where several documents share a row: the first token of each is given, as
    it is where a document has a row of its own.
    """

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        rngs = {} if rng is None else {"dropout": rng}
        inputs = [batch[name] for name in ("tokens", "mask", "segments") if name in batch]
        z = model.apply(model_variables(variables), *inputs, method="logits", rngs=rngs)
        weight = (batch["mask"][:, :-1] * batch.get("loss_mask", batch["mask"])[:, 1:]).astype(jnp.float32)
        if "segments" in batch:
            weight *= batch["segments"][:, 1:] == batch["segments"][:, :-1]
        nats = jnp.sum(cross_entropy(z[:, :-1], batch["tokens"][:, 1:]) * weight)
        return Loss(nats, jnp.sum(weight), {}, (z[:, :-1], weight))

    return fn
