"""Language modelling: predict the next token."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.tasks.chunked import chunked_nats, model_head, model_unembed
from research.tasks.loss import Loss, cross_entropy, model_variables


def loss(model: nn.Module, chunk: int | None = None) -> Callable[[dict, dict, jax.Array | None], Loss]:
    """Cross-entropy in nats a token.

    batch: tokens, mask int [B, T]; optional loss_mask [B, T] marks the tokens to predict (default: every real one but
    the first); optional segments int [B, T], where several documents share a row: the first token of each is given, as
    it is where a document has a row of its own; optional weight [B] of the rows.

    chunk: how many tokens' logits exist at a time; None keeps all of them [B, T, V], and only then are they `outputs`.
    """

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        given, rngs = model_variables(variables), {} if rng is None else {"dropout": rng}
        inputs = [batch[name] for name in ("tokens", "mask", "segments") if name in batch]
        weight = (batch["mask"][:, :-1] * batch.get("loss_mask", batch["mask"])[:, 1:]).astype(jnp.float32)
        if "segments" in batch:
            weight *= batch["segments"][:, 1:] == batch["segments"][:, :-1]
        if "weight" in batch:
            weight *= batch["weight"][:, None]
        labels = batch["tokens"][:, 1:]
        if chunk is None:
            z = model.apply(given, *inputs, method="logits", rngs=rngs)[:, :-1]
            return Loss(jnp.sum(cross_entropy(z, labels) * weight), jnp.sum(weight), {}, (z, weight))
        hidden = model.apply(given, *inputs, rngs=rngs)[:, :-1]
        rows = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), weight.reshape(-1)
        nats, _ = chunked_nats(model_unembed(model), model_head(variables), *rows, chunk, rng=rng)
        return Loss(nats, jnp.sum(weight), {})

    return fn
