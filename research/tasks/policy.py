"""Losses of policy gradients as pure functions of log-probabilities, advantages and masks [B, T].

With l, l' the log-probabilities of the policy and of the one that sampled, rho = exp(l - l') and A the advantage:

    clip       -min(rho A, clip(rho, 1 - low, 1 + high) A); dual clip for A < 0: at most -c A       arXiv 1707.06347
    sequence   the same with rho = exp(mean over tokens of l - l')                                   arXiv 2507.18071
    cispo      -stop_gradient(min(rho, 1 + high)) A l                                                arXiv 2506.13585
    reinforce  -A l
    value      max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2) / 2

to which `kl_coef` adds an estimate of KL(policy || reference) and `entropy_coef` takes the entropy away. Reductions:
`token` (mean over the tokens of the whole batch), `sequence` (mean over tokens, then over rows), `constant` (sum over
tokens, divided by rows times `length`). BNPO (token mean over the batch at hand) and DAPO share the reduction here, as
a Loss adds up over micro-batches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from research.errors import FlagError, did_you_mean
from research.tasks.divergence import ESTIMATORS
from research.tasks.loss import Loss

stop = jax.lax.stop_gradient
SURROGATES, RATIOS, REDUCTIONS = (
    ("clip", "cispo", "reinforce"),
    ("token", "sequence"),
    ("token", "sequence", "constant"),
)


@dataclass(frozen=True)
class Variant:
    """advantage: its estimator, a name of `research.rl.advantages.GROUP`, or "gae". importance_cap: bound of the weight
    exp(l' - l_sampler) where the sampler's numbers differ from the trainer's; None uses no weight. length: of the
    constant reduction, in tokens.
    """

    advantage: str
    surrogate: str = "clip"
    ratio: str = "token"
    reduction: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl: str = "k3"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    length: int = 1
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        choices = {"surrogate": SURROGATES, "ratio": RATIOS, "reduction": REDUCTIONS, "kl": ESTIMATORS}
        for field, valid in choices.items():
            if (value := getattr(self, field)) not in valid:
                raise FlagError(f"no {field} {value!r}.{did_you_mean(value, valid)}")
        if not 0 <= self.clip_low <= 1 or not 0 <= self.clip_high < math.inf:
            raise FlagError(f"clip_low={self.clip_low} must lie in 0 to 1 and clip_high={self.clip_high} be at least 0")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise FlagError(f"dual_clip={self.dual_clip} must be above 1")
        if self.length < 1:
            raise FlagError(f"length={self.length} must be at least 1 token")


VARIANTS: dict[str, Variant] = {
    "ppo": Variant("gae"),
    "grpo": Variant("group", reduction="sequence"),  # arXiv 2402.03300
    "dr_grpo": Variant("centred", reduction="constant", length=256),  # arXiv 2503.20783
    "dapo": Variant("group", clip_high=0.28),  # arXiv 2503.14476
    "bnpo": Variant("group"),
    "gspo": Variant("group", ratio="sequence", reduction="sequence", clip_low=3e-4, clip_high=4e-4),
    "cispo": Variant("group", surrogate="cispo", clip_high=0.28),
    "rloo": Variant("leave_one_out", surrogate="reinforce", reduction="constant"),  # arXiv 2402.14740
    "reinforce_pp": Variant("global"),  # REINFORCE++, arXiv 2501.03262
}


def variant(name: str) -> Variant:
    """Raises FlagError: no such variant."""
    if name not in VARIANTS:
        raise FlagError(f"no variant {name!r}.{did_you_mean(name, VARIANTS)}")
    return VARIANTS[name]


def reduce(
    x: jax.Array, mask: jax.Array, how: str, length: int = 1, weight: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(sum [], weight []) of x [B, T] where mask [B, T]; weight [B]. A row without a token counts nowhere."""
    mask = mask.astype(jnp.float32)
    x, count = jnp.where(mask > 0, x, 0.0), jnp.sum(mask, axis=1)
    row = (count > 0) * (1.0 if weight is None else weight.astype(jnp.float32))
    sums = jnp.sum(x * mask, axis=1)
    if how == "token":
        return jnp.sum(sums * row), jnp.sum(count * row)
    if how == "sequence":
        return jnp.sum(sums / jnp.maximum(count, 1) * row), jnp.sum(row)
    return jnp.sum(sums * row), length * jnp.sum(row)


def log_ratio(logps: jax.Array, old: jax.Array, mask: jax.Array, how: str) -> jax.Array:
    """l - l' [B, T], 0 outside the mask; `sequence` gives each token of a row its mean."""
    d = jnp.where(mask > 0, logps - old, 0.0)
    if how == "token":
        return d
    mean = jnp.sum(d, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
    return jnp.broadcast_to(mean[:, None], d.shape)


def surrogate(v: Variant, logps: jax.Array, ratio: jax.Array, advantages: jax.Array) -> jax.Array:
    """The loss of each token [B, T], before reduction."""
    if v.surrogate == "reinforce":
        return -advantages * logps
    if v.surrogate == "cispo":
        return -stop(jnp.minimum(ratio, 1 + v.clip_high)) * advantages * logps
    kept = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - v.clip_low, 1 + v.clip_high) * advantages)
    if v.dual_clip is not None:
        kept = jnp.where(advantages < 0, jnp.maximum(kept, v.dual_clip * advantages), kept)
    return -kept


def policy_loss(
    v: Variant,
    logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    old: jax.Array | None = None,
    reference: jax.Array | None = None,
    sampler: jax.Array | None = None,
    entropy: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> Loss:
    """logps, mask [B, T] of completion tokens; advantages [B] or [B, T]; all without gradient but logps and entropy.

    old: l' [B, T], by default logps themselves, whose ratio is 1 exactly. reference, entropy [B, T] are needed where
    their coefficients are not 0. sampler [B, T]: log-probabilities as the sampler computed them. weight [B].

    Raises FlagError: a coefficient without its array.
    """
    if v.kl_coef and reference is None:
        raise FlagError(f"kl_coef={v.kl_coef} needs the reference's log-probabilities")
    if v.entropy_coef and entropy is None:
        raise FlagError(f"entropy_coef={v.entropy_coef} needs entropies")
    real = mask > 0
    clean = lambda x: None if x is None else jnp.where(real, x, 0.0)  # noqa: E731
    logps, reference, sampler, entropy = clean(logps), clean(reference), clean(sampler), clean(entropy)
    old = stop(logps) if old is None else stop(clean(old))
    advantages = clean(stop(jnp.broadcast_to(advantages if advantages.ndim == 2 else advantages[:, None], mask.shape)))

    d = log_ratio(logps, old, mask, v.ratio)
    ratio = jnp.exp(d)
    each = surrogate(v, logps, ratio, advantages)
    if v.importance_cap is not None and sampler is not None:
        each = each * stop(jnp.minimum(jnp.exp(old - sampler), v.importance_cap))
    if v.kl_coef:
        each = each + v.kl_coef * ESTIMATORS[v.kl](logps, stop(reference))
    if v.entropy_coef:
        each = each - v.entropy_coef * entropy

    low, high = (ratio < 1 - v.clip_low) & (advantages < 0), (ratio > 1 + v.clip_high) & (advantages > 0)
    metrics = {
        "ratio_mean": ratio,
        "clip_fraction": low | high,
        "clip_fraction/low": low,
        "clip_fraction/high": high,
        "approx_kl": ESTIMATORS["k3"](old, logps),
        "advantage_mean": advantages,
    }
    if reference is not None:
        metrics |= {"kl": logps - reference, "kl/k3": ESTIMATORS["k3"](logps, reference)}
    if entropy is not None:
        metrics["entropy"] = entropy
    total = reduce(each, mask, v.reduction, v.length, weight)
    return Loss(*total, {k: reduce(stop(x * 1.0), mask, "token", 1, weight) for k, x in metrics.items()})


def value_loss(
    values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    old: jax.Array | None = None,
    clip: float | None = 0.2,
    weight: jax.Array | None = None,
) -> Loss:
    """Half the squared error, mean over tokens; values, returns, mask, old [B, T].

    clip None, or old None, clips nothing. `explained_variance` is that of each micro-batch, averaged by tokens.
    """
    real = mask > 0
    values, returns = jnp.where(real, values, 0.0), stop(jnp.where(real, returns, 0.0))
    error = jnp.square(values - returns)
    clipped = jnp.zeros_like(error)
    if clip is not None and old is not None:
        old = stop(jnp.where(real, old, 0.0))
        bounded = jnp.square(old + jnp.clip(values - old, -clip, clip) - returns)
        clipped, error = (bounded > error) * 1.0, jnp.maximum(error, bounded)
    token: Callable = lambda x: reduce(stop(x), mask, "token", 1, weight)  # noqa: E731
    mean = lambda x: token(x)[0] / jnp.maximum(token(x)[1], 1e-12)  # noqa: E731
    variance = lambda x: mean(jnp.square(x - mean(x)))  # noqa: E731
    total = reduce(0.5 * error, mask, "token", 1, weight)
    explained = 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-12)
    return Loss(
        *total,
        {
            "value/clip_fraction": token(clipped),
            "value/mean": token(values),
            "explained_variance": (stop(explained) * total[1], total[1]),
        },
    )


def add(policy: Loss, value: Loss, coef: float) -> Loss:
    """policy + coef * value, each with its own weight: exact over micro-batches where both reduce over tokens."""
    scale = policy.weight / jnp.maximum(value.weight, 1e-12)
    metrics = policy.metrics | value.metrics | {"value/loss": (stop(value.sum), value.weight)}
    return Loss(policy.sum + coef * scale * value.sum, policy.weight, metrics)
