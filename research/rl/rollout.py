"""Rollouts: completions of a policy's own, what they were worth, and the loss that learns from them.

    s = sampler(model, max_new=16, stop=(eos,))(variables, reference, tokens, mask, rng)   # jitted
    score = rewards.score(functions, prompts, texts(s, decode)).total                      # on the host, [R]
    rows, stats = credit(variant, s, score, group=8, kl_coef=0.05)                         # advantages
    variables["rollout"] = {"rows": rows, "stats": stats}                                  # what `loss` reads by number

R rows of T tokens are a prompt, padded on the left, and its completion, padded on the right: a completion ends with the
first stop token, which belongs to it, and masks come from lengths. The rollout lives in the train state, so a batch is
row numbers and a run that stops between two of its steps goes on with the same bits. The reference is the same base
buffers with the adapters off, and is applied once a rollout, never in a step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.generate.decode import generate
from research.generate.sampling import Sampling
from research.rl import advantages, kl
from research.rl.value import Seen, values
from research.tasks import policy
from research.tasks.alignment import TaskLoss, sequence_logprobs
from research.tasks.loss import Loss
from research.tasks.policy import Variant

KL_IN_REWARD = ("gae", "leave_one_out", "global")  # of PPO, RLOO and REINFORCE++; the others have it in the loss


class Sampled(NamedTuple):
    """tokens, mask, completion int32 [R, T]; old, reference, values fp32 [R, T], of completion tokens, else 0: the
    policy's and the reference's log-probabilities at the sampling temperature, and the value head's opinion (zeros
    without one). ended bool [R]: whether a stop token came. gap []: how far the sampler's log-probabilities lie from
    `old` at most, in nats; 0 at another temperature than 1, where they are of different distributions.
    """

    tokens: jax.Array
    mask: jax.Array
    completion: jax.Array
    old: jax.Array
    reference: jax.Array
    values: jax.Array
    ended: jax.Array
    gap: jax.Array


@functools.lru_cache(maxsize=16)
def sampler(
    model: nn.Module,
    *,
    max_new: int,
    stop: tuple[int, ...] = (),
    pad: int = 0,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Callable[..., Sampled]:
    """Returns the jitted (variables, reference, tokens, mask, rng) -> Sampled.

    Variables are realised; with collection `head` they have a value head. tokens, mask int [R, P] are padded on the
    left; T = P + max_new. chunk: so many positions' logits live at a time when they are scored.
    """

    @jax.jit
    def sample(variables: dict, reference: dict, tokens: jax.Array, mask: jax.Array, rng: jax.Array) -> Sampled:
        drawn = generate(
            model, variables, tokens, mask, rng, max_new=max_new, sampling=Sampling(temperature), stop=stop, pad=pad
        )
        joined = {
            "tokens": jnp.concatenate([tokens, drawn.tokens], axis=1).astype(jnp.int32),
            "mask": jnp.concatenate([mask, drawn.mask], axis=1).astype(jnp.int32),
            "completion": jnp.concatenate([jnp.zeros_like(mask), drawn.mask], axis=1).astype(jnp.int32),
        }
        seen, heat = Seen(model, variables, joined), temperature or 1.0  # a greedy sampler is scored as it is
        old = sequence_logprobs(seen, variables, joined, heat, chunk).logps
        known = sequence_logprobs(model, reference, joined, heat, chunk).logps
        real = joined["completion"] > 0
        worth = jnp.where(real, values(variables["head"], seen.hidden), 0.0) if "head" in variables else 0.0 * old
        ended = jnp.any(jnp.isin(drawn.tokens, jnp.asarray(stop, jnp.int32)) & (drawn.mask > 0), axis=1)
        gap = jnp.max(jnp.abs(old[:, tokens.shape[1] :] - drawn.logprobs)) * (heat == 1.0)
        return Sampled(**joined, old=old, reference=known, values=worth, ended=ended, gap=gap)

    return sample


def texts(sampled: Sampled, decode: Callable[[list[int]], str]) -> list[str]:
    """The R completions as `decode` (which leaves special tokens out) writes them."""
    tokens, real = np.asarray(sampled.tokens), np.asarray(sampled.completion) > 0
    return [decode(row[here].tolist()) for row, here in zip(tokens, real, strict=True)]


@functools.partial(jax.jit, static_argnames=("v", "group", "dynamic", "gamma", "lam"))
def credit(
    v: Variant,
    s: Sampled,
    score: jax.Array,
    group: int,
    kl_coef: jax.Array | float = 0.0,
    *,
    missing_eos: jax.Array | float = 0.0,
    dynamic: bool = False,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What each row teaches: (rows, leaves [R, ...]; stats, []).

    score [R]: the rewards, those of a prompt's `group` completions side by side; NaN where none could be given, and
    such a row teaches nothing. missing_eos is taken from the score of a completion without a stop token, kl_coef k1
    from that of PPO's tokens and of RLOO's and REINFORCE++'s rows. dynamic: a group of equal rewards weighs nothing
    (arXiv 2503.14476, without drawing another in its place).
    """
    fine, real = jnp.isfinite(score), s.completion > 0
    k1 = jnp.sum(jnp.where(real, s.old - s.reference, 0.0), axis=1)
    final = score - missing_eos * ~s.ended
    groups, weight = final.reshape(-1, group), fine.astype(jnp.float32)
    rows = {k: getattr(s, k) for k in ("tokens", "mask", "completion", "old", "reference")}
    if v.advantage == "gae":
        shaped = kl.shaped(s.old, s.reference, s.completion, jnp.where(fine, final, 0.0), kl_coef)
        gained, returns = advantages.gae(shaped, s.values, s.completion, gamma, lam)
        gained = advantages.whiten(gained, s.completion * fine[:, None])
        rows |= {"returns": returns, "values": s.values}
    else:
        charged = groups - kl_coef * k1.reshape(groups.shape) if v.advantage in KL_IN_REWARD else groups
        gained = jnp.broadcast_to(advantages.GROUP[v.advantage](charged).reshape(-1, 1), s.old.shape)
    teaches = advantages.teaches(groups)
    if dynamic:
        weight = weight * jnp.repeat(teaches, group)
    count = jnp.maximum(jnp.sum(fine), 1)
    mean = lambda x: jnp.sum(jnp.where(fine, x, 0.0)) / count  # noqa: E731
    stats = {
        "reward": mean(score),
        "reward_std": jnp.sqrt(mean(jnp.square(score - mean(score)))),
        "frac_reward_zero_std": jnp.mean(~teaches),
        "unscored": jnp.mean(~fine),
        "kl_sequence": jnp.mean(k1),
        "kl_coef": jnp.asarray(kl_coef, jnp.float32),
        "completion_length": jnp.mean(jnp.sum(s.completion, axis=1)),
        "terminated": jnp.mean(s.ended),
        "sampler_gap": s.gap,
    }
    rows |= {"advantages": jnp.where(real, gained, 0.0), "weight": weight}
    return rows, jax.tree.map(lambda x: x.astype(jnp.float32), stats)


def empty(v: Variant, rows: int, length: int, group: int, kl_coef: float = 0.0) -> dict[str, Any]:
    """The collection `rollout` before the first one: zeros of the shapes that `credit` gives."""
    of = lambda *dtype: jnp.zeros((rows, length), *dtype)  # noqa: E731
    whole = Sampled(*(of(jnp.int32),) * 3, *(of(),) * 3, jnp.zeros(rows, bool), jnp.zeros(()))
    shapes = jax.eval_shape(lambda: credit(v, whole, jnp.zeros(rows), group))
    leaves, stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return {"rows": leaves, "stats": stats | {"kl_coef": jnp.asarray(kl_coef, jnp.float32)}}


def loss(
    model: nn.Module,
    v: Variant,
    *,
    temperature: float = 1.0,
    value_coef: float = 0.1,
    value_clip: float | None = 0.2,
    chunk: int | None = None,
) -> TaskLoss:
    """Learns from the rollout in variables["rollout"].

    batch: rows int [B], the numbers of its rows; weight [B]; first [B], not 0 in the first step after sampling, where
    the policy that learns is the one that sampled: its own log-probabilities are then the old ones and the ratio is 1
    exactly, not up to rounding. The rollout's stats are metrics of every step that learns from it.
    """

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        r = jax.tree.map(lambda x: x[batch["rows"]], variables["rollout"]["rows"])
        seen = Seen(model, variables, r)
        scored = sequence_logprobs(seen, variables, r, temperature, chunk)
        weight = batch["weight"] * r["weight"]
        old = jnp.where(batch["first"][:, None] > 0, jax.lax.stop_gradient(scored.logps), r["old"])
        given = {"old": old, "reference": r["reference"], "entropy": scored.entropy, "weight": weight}
        out = policy.policy_loss(v, scored.logps, r["advantages"], scored.mask, **given)
        if v.advantage == "gae":
            worth = values(variables["head"], seen.hidden)
            of_value = policy.value_loss(worth, r["returns"], scored.mask, r["values"], value_clip, weight)
            out = policy.add(out, of_value, value_coef)
        one = jnp.ones(())
        return out._replace(metrics=out.metrics | {k: (x, one) for k, x in variables["rollout"]["stats"].items()})

    return fn


def row_batches(rows: Callable[[int], dict[str, np.ndarray]], every: int) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> batch for `loss`: `rows` gives {"rows", "weight"} [M, B]; a rollout is learnt from for `every` steps."""

    def batch(step: int) -> dict[str, np.ndarray]:
        found = rows(step)
        return found | {"first": np.full(found["rows"].shape, step % every == 0, np.float32)}

    return batch
