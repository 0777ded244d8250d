"""From a model to the log-probabilities that the losses of `preference` and `policy` are functions of.

The reference of a preference loss is one of
    base             the same base buffers with the adapters off: no copy. Wrong where base leaves themselves train
    initial_adapter  variables["reference"], frozen collections laid over the base: {"peft": ...}, or a whole model's
    batch            summed log-probabilities computed before: reference_chosen, reference_rejected [B]
The policy gets no rng, so that dropout is off in both and a fresh adapter starts at ratio 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import FlagError, did_you_mean
from research.tasks import preference
from research.tasks.loss import Loss, cross_entropy, model_variables
from research.tasks.preference import Completion, Options

REFERENCES = ("base", "initial_adapter", "batch")
TaskLoss = Callable[[dict, dict, jax.Array | None], Loss]


class Scored(NamedTuple):
    """logps, entropy [B, T] fp32 nats of the tokens where mask [B, T] is 1; 0 elsewhere."""

    logps: jax.Array
    mask: jax.Array
    entropy: jax.Array


def sequence_logprobs(
    model: nn.Module, variables: dict, batch: dict, temperature: float = 1.0, chunk: int | None = None
) -> Scored:
    """Scores the completion of each row: position t holds log p(token t | tokens before t).

    batch: tokens, mask, completion int [B, T]; completion marks the tokens to score, its EOS included. Masks come from
    lengths, never from a pad id. Optional segments int [B, T], where several documents share a row. temperature divides
    the logits, as sampling did. chunk: so many positions' logits [B, chunk, V] live at a time, computed again in the
    backward pass; None keeps [B, T, V].
    """
    inputs = [batch[name] for name in ("tokens", "mask", "segments") if name in batch]
    hidden = model.apply(model_variables(variables), *inputs)[:, :-1]
    labels, shape = batch["tokens"][:, 1:], batch["tokens"].shape

    def part(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z = model.apply(model_variables(variables), xs[0], method="unembed").astype(jnp.float32) / temperature
        p = jax.nn.softmax(z, axis=-1)
        return -cross_entropy(z, xs[1]), jax.nn.logsumexp(z, axis=-1) - jnp.sum(p * z, axis=-1)

    if chunk is None:
        logps, entropy = part((hidden, labels))
    else:
        steps = hidden.shape[1]
        extra = -steps % chunk
        widen = lambda x: jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
        cut = lambda x: jnp.moveaxis(x.reshape(shape[0], -1, chunk, *x.shape[2:]), 1, 0)  # noqa: E731
        out = jax.lax.map(jax.checkpoint(part), (cut(widen(hidden)), cut(widen(labels))))
        logps, entropy = (jnp.moveaxis(x, 0, 1).reshape(shape[0], -1)[:, :steps] for x in out)
    # A token is scored where it and the one before it are real: the first of a row has nothing to be predicted from.
    mask = batch["completion"][:, 1:] * batch["mask"][:, 1:] * batch["mask"][:, :-1]
    if "segments" in batch:
        mask *= batch["segments"][:, 1:] == batch["segments"][:, :-1]
    place = lambda x: jnp.pad(jnp.where(mask > 0, x, 0.0), ((0, 0), (1, 0)))  # noqa: E731
    return Scored(place(logps), jnp.pad(mask, ((0, 0), (1, 0))).astype(jnp.float32), place(entropy))


def documents(scored: Scored, segments: jax.Array, count: int) -> Scored:
    """Packed rows [B, T] as a row [B * count, T] for each of their documents 1 to `count`, all else masked.

    Then every loss of `preference` and `policy` is what it is of documents that were never packed: a masked place is
    not read. Numbers are copied, not computed again.
    """
    own = (segments[:, None] == jnp.arange(1, count + 1)[:, None]).reshape(-1, segments.shape[1])
    return Scored(*(jnp.where(own, jnp.repeat(x, count, axis=0), 0.0) for x in scored))


def reference_variables(variables: dict, reference: str) -> dict:
    """What the reference policy is applied to, without gradient. Raises FlagError: unknown, or nothing was kept."""
    if reference not in REFERENCES:
        raise FlagError(f"no reference {reference!r}.{did_you_mean(reference, REFERENCES)}")
    kept = {}
    if reference == "initial_adapter":
        if "reference" not in variables:
            raise FlagError("reference 'initial_adapter' needs the collection 'reference' in the variables")
        kept = variables["reference"]
    return jax.lax.stop_gradient({"params": variables["params"], **kept})


def _completion(model: nn.Module, variables: dict, batch: dict, reference: str | None, known: str, chunk: int | None):
    def score(variables: dict) -> Scored:
        scored = sequence_logprobs(model, variables, batch, chunk=chunk)
        return documents(scored, batch["segments"], 2 * batch["weight"].shape[1]) if "segments" in batch else scored

    scored = score(variables)
    if reference is None:
        return preference.completion(scored.logps, scored.mask)
    if reference == "batch":
        return preference.completion(scored.logps, scored.mask, batch[known])
    return preference.completion(scored.logps, scored.mask, score(reference_variables(variables, reference)).logps)


def preference_loss(
    model: nn.Module, name: str, options: Options | None = None, reference: str = "base", chunk: int | None = None
) -> TaskLoss:
    """One forward pass over both sides (and one of the reference).

    batch: chosen, rejected {"tokens", "mask", "completion"} [B, T] of one width; optional weight [B]; with reference
    "batch" reference_chosen, reference_rejected [B]. A pair of equal sides teaches nothing: it weighs 0, and
    `skipped` is the share of such pairs.

    Or packed, as `packing.pack_pairs` leaves them: tokens, mask, completion, segments [B, T] and weight [B, P], 0 where
    a row has fewer than P pairs; reference_chosen, reference_rejected [B, P].
    """
    options = options or Options()
    if name not in preference.LOSSES:
        raise FlagError(f"no preference loss {name!r}.{did_you_mean(name, preference.LOSSES)}")
    if reference not in REFERENCES:
        raise FlagError(f"no reference {reference!r}.{did_you_mean(reference, REFERENCES)}")
    source = None if name in preference.REFERENCE_FREE else reference

    def packed(variables: dict, batch: dict) -> Loss:
        if source == "batch":
            known = jnp.stack([batch["reference_chosen"], batch["reference_rejected"]], axis=-1)
            batch = batch | {"known": known.reshape(-1)}
        whole = _completion(model, variables, batch, source, "known", chunk)
        win, lose = (Completion(*(x.reshape(-1, 2)[:, side] for x in whole)) for side in (0, 1))
        return preference.paired(name, win, lose, options, batch["weight"].reshape(-1))

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        if "segments" in batch:
            return packed(variables, batch)
        chosen, rejected = batch["chosen"], batch["rejected"]
        both = {k: jnp.concatenate([chosen[k], rejected[k]]) for k in ("tokens", "mask", "completion")}
        if source == "batch":
            both["known"] = jnp.concatenate([batch["reference_chosen"], batch["reference_rejected"]])
        whole = _completion(model, variables, both, source, "known", chunk)
        count = len(chosen["tokens"])
        win, lose = Completion(*(x[:count] for x in whole)), Completion(*(x[count:] for x in whole))
        given = batch.get("weight", jnp.ones(count)).astype(jnp.float32)
        real = {k: jnp.where(s["mask"] > 0, s["tokens"] + 1, 0) for k, s in (("w", chosen), ("l", rejected))}
        same = jnp.all(real["w"] == real["l"], axis=1)
        out = preference.paired(name, win, lose, options, given * ~same)
        return out._replace(metrics=out.metrics | {"skipped": (jnp.sum(given * same), jnp.sum(given))})

    return fn


def kto_loss(
    model: nn.Module, options: Options | None = None, reference: str = "base", chunk: int | None = None
) -> TaskLoss:
    """batch: tokens, mask, completion [B, T], desirable [B], optional weight [B]; `mismatched` {"tokens", "mask",
    "completion"} [B, T], the prompt of each row with the completion of another one (`research.rl.pairs.rotate`); with
    reference "batch" reference_logps [B] in both.

    z0 is estimated in the micro-batch at hand; without `mismatched`, or with one row, it is 0.
    """
    options = options or Options()
    if reference not in REFERENCES:
        raise FlagError(f"no reference {reference!r}.{did_you_mean(reference, REFERENCES)}")

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        weight, z0 = batch.get("weight"), jnp.zeros(())
        scored = _completion(model, variables, batch, reference, "reference_logps", chunk)
        if "mismatched" in batch and len(batch["tokens"]) > 1:
            still = jax.lax.stop_gradient(variables)
            other = _completion(model, still, batch["mismatched"], reference, "reference_logps", chunk)
            z0 = preference.kto_baseline(other, weight)
        return preference.kto(scored, batch["desirable"], z0, options, weight)

    return fn
