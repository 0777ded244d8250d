"""Optimisers and learning-rate schedules by name.

    update = -schedule(t) * (core(g) + weight_decay * w)

Decay is decoupled (AdamW) for every core. decay="matrices" leaves out what papers leave out, biases and norms: a leaf's
own dimensions decide, see `decayed`. decay="all" takes every trainable leaf.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from research.errors import FlagError, did_you_mean
from research.peft import tree

PyTree = Any

# Defaults of (b1, b2, eps) are those of each paper; a core ignores what it has no use for.
DEFAULTS = {
    "adamw": (0.9, 0.999, 1e-8),
    "adam": (0.9, 0.999, 1e-8),
    "sgd": (0.0, 0.0, 0.0),
    "momentum": (0.9, 0.0, 0.0),
    "rmsprop": (0.0, 0.9, 1e-8),
    "lion": (0.9, 0.99, 0.0),
    "adafactor": (0.0, 0.8, 1e-30),
}
SHAPES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")
WSD_FALL = 0.2  # the last part of the steps after warmup in which "wsd" falls


def _core(name: str, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    if name in ("adamw", "adam"):
        return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if name == "momentum":
        return optax.trace(decay=b1)
    if name == "rmsprop":
        return optax.scale_by_rms(decay=b2, eps=eps)
    if name == "lion":
        return optax.scale_by_lion(b1=b1, b2=b2)
    if name == "adafactor":
        # Without the factor of the parameters' own size: an added matrix that starts at zero would hardly move.
        return optax.chain(optax.scale_by_factored_rms(decay_rate=b2, epsilon=eps), optax.clip_by_block_rms(1.0))
    return optax.identity()


def make(
    name: str = "adamw",
    learning_rate: float = 1e-3,
    *,
    schedule: str = "constant",
    steps: int | None = None,
    warmup: float = 0,
    final: float = 0.0,
    weight_decay: float = 0.0,
    decay: str = "matrices",
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
) -> optax.GradientTransformation:
    """Returns an optax optimiser, for trees with holes and under vmap too. Raises FlagError for a bad name or value, a
    learning rate of 0 among them.

    `schedule`, `steps`, `warmup` and `final` are those of `make_schedule`. b1, b2, eps: None takes the paper's (b1 is
    also the momentum, b2 RMSProp's and Adafactor's decay).
    """
    if name not in DEFAULTS:
        raise FlagError(f"unknown optimizer {name!r}.{did_you_mean(name, DEFAULTS)}")
    if decay not in ("matrices", "all"):
        raise FlagError(f"unknown decay {decay!r}.{did_you_mean(decay, ('matrices', 'all'))}")
    if not learning_rate > 0:
        raise FlagError(f"learning_rate={learning_rate} must be above 0")
    _check("weight_decay", weight_decay, 0.0)
    if name == "adam" and weight_decay:
        raise FlagError(f"adam has no weight decay, but weight_decay={weight_decay}. Did you mean 'adamw'?")
    b1, b2, eps = (
        given if given is not None else own for given, own in zip((b1, b2, eps), DEFAULTS[name], strict=True)
    )
    _check("b1", b1, 0.0, 1.0)
    _check("b2", b2, 0.0, 1.0)
    _check("eps", eps, 0.0)
    parts = [_core(name, b1, b2, eps)]
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decayed if decay == "matrices" else None))
    rate = make_schedule(schedule, learning_rate, steps=steps, warmup=warmup, final=final)
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def make_schedule(
    name: str, learning_rate: float, *, steps: int | None = None, warmup: float = 0, final: float = 0.0
) -> Callable[[Any], Any]:
    """Returns `rate(t)`, t updates done so far.

    It is learning_rate * t / warmup while t < warmup, then falls as `name` says to the fraction `final` at t = steps:
    "wsd" (warmup, stable, decay: arXiv 2404.06395) stays full and falls linearly over the last WSD_FALL of what is
    left, "inverse_sqrt" (arXiv 1706.03762, section 5.3) is sqrt(warmup / t), at least `final`.

    `warmup` counts steps, or is a fraction of `steps` when below 1. Only "constant" and "inverse_sqrt" without a
    fraction can do without `steps`.
    """
    if name not in SHAPES:
        raise FlagError(f"unknown schedule {name!r}.{did_you_mean(name, SHAPES)}")
    _check("learning_rate", learning_rate, 0.0)
    _check("warmup", warmup, 0)
    _check("final", final, 0.0, 1.0, closed=True)
    if steps is None and (name not in ("constant", "inverse_sqrt") or 0 < warmup < 1):
        raise FlagError(f"schedule {name!r} with warmup={warmup} needs the number of steps")
    if warmup >= 1 and warmup != int(warmup):
        raise FlagError(f"warmup={warmup} is neither a number of steps nor a fraction below 1")
    rise = round(warmup * steps) if 0 < warmup < 1 else int(warmup)
    if steps is not None and rise > steps:
        raise FlagError(f"warmup={rise} is longer than steps={steps}")
    fall = max(1, (steps or 0) - rise)

    def rate(t: Any) -> Any:
        done = jnp.clip((t - rise) / fall, 0.0, 1.0)
        if name == "constant":
            shape = 1.0
        elif name == "linear":
            shape = 1.0 - (1.0 - final) * done
        elif name == "wsd":
            shape = 1.0 - (1.0 - final) * jnp.maximum(0.0, (done - 1.0) / WSD_FALL + 1.0)
        elif name == "inverse_sqrt":
            shape = jnp.maximum(final, jnp.sqrt(max(1, rise) / jnp.maximum(t, max(1, rise))))
        else:
            shape = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(math.pi * done))
        return learning_rate * jnp.where(t < rise, t / max(1, rise), shape)

    return rate


def decayed(trainable: PyTree) -> PyTree:
    """The mask of decay="matrices": leaves of two dimensions or more, not counting the leading L of a scanned stack.

    So biases, norms and (IA)3's vectors, whose rest is not at 0, are left alone.
    """
    return tree.map_with_path(lambda path, x: x.ndim - ("layers" in path.split("/")) >= 2, trainable)


def _check(name: str, value: float, low: float, high: float = math.inf, closed: bool = False) -> None:
    if not (math.isfinite(value) and low <= value and (value <= high if closed else value < high)):
        limit = f"from {low:g}" if high == math.inf else f"from {low:g} {'to' if closed else 'to below'} {high:g}"
        raise FlagError(f"{name}={value} must be a finite number {limit}")
