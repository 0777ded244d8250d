"""Losses of preference learning as pure functions of log-probabilities and masks.

With L the summed log-probability of a completion, Lbar its mean over tokens, h = L - L_reference of the chosen (w) and
the rejected (l) one, d = h_w - h_l, s the logistic function and b = beta:

    dpo        -log s(b d); label_smoothing e: -(1-e) log s(b d) - e log s(-b d)       arXiv 2305.18290
    robust     [-(1-e) log s(b d) + e log s(-b d)] / (1 - 2e)                           arXiv 2403.00409
    ipo        (d - 1/(2b))^2, with sums (the paper's) or means over tokens             arXiv 2310.12036
    hinge      max(0, 1 - b d)                                                          arXiv 2305.10425
    apo_zero   1 - s(b h_w) + s(b h_l)        apo_down  s(b h_w) + 1 - s(b d)           arXiv 2408.06266
    nca        -log s(b h_w) - (log s(-b h_w) + log s(-b h_l)) / 2                      arXiv 2402.05369
    bco_pair   -log s(b h_w) - log s(-b h_l)                                            arXiv 2404.04656, shift 0
    sppo_hard  (h_w - 1/(2b))^2 + (h_l + 1/(2b))^2                                      arXiv 2405.00675
    orpo       NLL_w - b log s(odds_w - odds_l), odds = Lbar - log(1 - exp Lbar)        arXiv 2403.07691
    simpo      -log s(b (Lbar_w - Lbar_l) - gamma)                                      arXiv 2405.14734
    cpo        -log s(b (L_w - L_l)) + NLL_w                                            arXiv 2401.08417
    kto        desirable D (1 - s(b (h - z0))), undesirable U (1 - s(b (z0 - h)))       arXiv 2402.01306

NLL is the mean over the tokens of one completion, and a row counts as one: then sums and weights of micro-batches add
up to those of the whole batch, which a mean over all tokens beside a mean over rows would not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.errors import FlagError, did_you_mean
from research.tasks.loss import Loss

log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


@dataclass(frozen=True)
class Options:
    """beta: strength of the tie to the reference (ORPO's lambda). label_smoothing: share of flipped labels, for dpo and
    robust. gamma: SimPO's margin, not multiplied by beta. length_normalised: IPO on means over tokens. divergence: of
    f-DPO (arXiv 2309.16240), `reverse_kl`, `forward_kl` or `js`. desirable, undesirable: KTO's D and U.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    length_normalised: bool = False
    divergence: str = "reverse_kl"
    desirable: float = 1.0
    undesirable: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise FlagError(f"beta={self.beta} must be a finite number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise FlagError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")
        if self.divergence not in DIVERGENCES:
            raise FlagError(f"no divergence {self.divergence!r}.{did_you_mean(self.divergence, DIVERGENCES)}")


# f'(ratio) up to a constant, as a function of the log-ratio h.
DIVERGENCES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "reverse_kl": lambda h: h,
    "forward_kl": lambda h: -jnp.expm1(-h),
    "js": lambda h: math.log(2) + log_sigmoid(h),
}


class Completion(NamedTuple):
    """Summed log-probability [B] of a completion under the policy and the reference, and its number of tokens [B]."""

    logps: jax.Array
    length: jax.Array
    reference: jax.Array

    @property
    def ratio(self) -> jax.Array:
        return self.logps - self.reference

    @property
    def mean(self) -> jax.Array:
        return self.logps / jnp.maximum(self.length, 1)


def completion(logps: jax.Array, mask: jax.Array, reference: jax.Array | None = None) -> Completion:
    """logps, mask [B, T]; reference [B, T], or [B] where summed before, or None for a loss that needs none.

    What stands where the mask is 0 is never read, be it NaN.
    """
    mask = mask.astype(jnp.float32)
    total = masked_sum(logps, mask)
    if reference is None:
        reference = jnp.zeros_like(total)
    elif reference.ndim == 2:
        reference = masked_sum(reference, mask)
    return Completion(total, jnp.sum(mask, axis=1), jax.lax.stop_gradient(reference))


def masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, T] -> [B] fp32."""
    return jnp.sum(jnp.where(mask > 0, x.astype(jnp.float32), 0.0) * mask, axis=1)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp x) for x < 0 without cancellation; x above -1e-7, a certainty in fp32, counts as -1e-7."""
    x = jnp.minimum(x, -1e-7)
    near = x > -math.log(2)
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def _difference(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    f = DIVERGENCES[o.divergence]
    return o.beta * (f(w.ratio) - f(l.ratio))


def dpo(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    d, e = _difference(w, l, o), o.label_smoothing
    return -(1 - e) * log_sigmoid(d) - e * log_sigmoid(-d)


def robust(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    d, e = _difference(w, l, o), o.label_smoothing
    return (-(1 - e) * log_sigmoid(d) + e * log_sigmoid(-d)) / (1 - 2 * e)


def ipo(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    lengths = (jnp.maximum(w.length, 1), jnp.maximum(l.length, 1)) if o.length_normalised else (1.0, 1.0)
    return jnp.square(w.ratio / lengths[0] - l.ratio / lengths[1] - 1 / (2 * o.beta))


def hinge(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    return jax.nn.relu(1 - o.beta * (w.ratio - l.ratio))


def apo_zero(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    return 1 - sigmoid(o.beta * w.ratio) + sigmoid(o.beta * l.ratio)


def apo_down(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    return sigmoid(o.beta * w.ratio) + 1 - sigmoid(o.beta * (w.ratio - l.ratio))


def nca(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    h, k = o.beta * w.ratio, o.beta * l.ratio
    return -log_sigmoid(h) - 0.5 * (log_sigmoid(-h) + log_sigmoid(-k))


def bco_pair(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    return -log_sigmoid(o.beta * w.ratio) - log_sigmoid(-o.beta * l.ratio)


def sppo_hard(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    return jnp.square(w.ratio - 1 / (2 * o.beta)) + jnp.square(l.ratio + 1 / (2 * o.beta))


def log_odds_ratio(w: Completion, l: Completion) -> jax.Array:  # noqa: E741
    """ORPO's, on probabilities averaged over tokens: with summed ones the odds are the probabilities."""
    return (w.mean - l.mean) - (log1mexp(w.mean) - log1mexp(l.mean))


def orpo(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    return -w.mean - o.beta * log_sigmoid(log_odds_ratio(w, l))


def simpo(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    return -log_sigmoid(o.beta * (w.mean - l.mean) - o.gamma)


def cpo(w: Completion, l: Completion, o: Options) -> jax.Array:  # noqa: E741
    return -log_sigmoid(o.beta * (w.logps - l.logps)) - w.mean


LOSSES: dict[str, Callable[[Completion, Completion, Options], jax.Array]] = {
    f.__name__: f for f in (dpo, robust, ipo, hinge, apo_zero, apo_down, nca, bco_pair, sppo_hard, orpo, simpo, cpo)
}
REFERENCE_FREE = frozenset({"orpo", "simpo", "cpo"})


def rows(name: str, chosen: Completion, rejected: Completion, options: Options) -> jax.Array:
    """The loss of each pair [B]. Raises FlagError: no such loss."""
    if name not in LOSSES:
        raise FlagError(f"no preference loss {name!r}.{did_you_mean(name, [*LOSSES, 'kto'])}")
    return LOSSES[name](chosen, rejected, options)


def paired(
    name: str, chosen: Completion, rejected: Completion, options: Options, weight: jax.Array | None = None
) -> Loss:
    """Mean over pairs; weight [B], and a pair with an empty side weighs 0.

    Metrics: `rewards/*` are beta h (beta Lbar for simpo, beta L for the other reference-free losses), an accuracy
    counts a tie as wrong, `logps/*` are sums over tokens in nats.
    """
    weight = jnp.ones_like(chosen.logps) if weight is None else weight.astype(jnp.float32)
    weight = weight * (chosen.length > 0) * (rejected.length > 0)
    each = [c.mean if name == "simpo" else c.ratio for c in (chosen, rejected)]
    win, lose = (options.beta * jax.lax.stop_gradient(r) for r in each)
    total = jnp.sum(weight)
    metrics = {
        "rewards/chosen": win,
        "rewards/rejected": lose,
        "rewards/margins": win - lose,
        "rewards/accuracies": win > lose,
        "logps/chosen": chosen.logps,
        "logps/rejected": rejected.logps,
    }
    return Loss(
        jnp.sum(rows(name, chosen, rejected, options) * weight),
        total,
        {k: (jnp.sum(jax.lax.stop_gradient(v) * weight), total) for k, v in metrics.items()},
    )


def kto_baseline(mismatched: Completion, weight: jax.Array | None = None) -> jax.Array:
    """z0 [] >= 0: the mean log-ratio of prompts with another row's completion, no gradient; 0 for no row."""
    weight = jnp.ones_like(mismatched.logps) if weight is None else weight.astype(jnp.float32)
    weight = weight * (mismatched.length > 0)
    mean = jnp.sum(mismatched.ratio * weight) / jnp.maximum(jnp.sum(weight), 1e-12)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto(
    scored: Completion, desirable: jax.Array, z0: jax.Array, options: Options, weight: jax.Array | None = None
) -> Loss:
    """Mean over rows; desirable bool [B]. Rows of one kind only are fine.

    Micro-batches give what the whole batch gives for the same z0; a z0 estimated in each micro-batch is noisier.
    """
    weight = jnp.ones_like(scored.logps) if weight is None else weight.astype(jnp.float32)
    weight, good = weight * (scored.length > 0), desirable.astype(bool)
    sign = jnp.where(good, 1.0, -1.0)
    scale = jnp.where(good, options.desirable, options.undesirable)
    each = scale * (1 - sigmoid(options.beta * sign * (scored.ratio - z0)))
    reward, total = options.beta * jax.lax.stop_gradient(scored.ratio), jnp.sum(weight)
    of = {"chosen": weight * good, "rejected": weight * ~good}
    metrics = {f"rewards/{k}": (jnp.sum(reward * w), jnp.sum(w)) for k, w in of.items()}
    metrics |= {f"logps/{k}": (jnp.sum(jax.lax.stop_gradient(scored.logps) * w), jnp.sum(w)) for k, w in of.items()}
    return Loss(jnp.sum(each * weight), total, metrics | {"kl": (z0 * total, total)})
