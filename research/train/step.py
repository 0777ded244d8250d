"""One training step, as a pure function for `jax.jit`.

    g = (sum over micro-batches of d loss.sum / d trainable) / (sum of loss.weight) + d penalty / d trainable
    g = clip(g);  u = tx(g) * rates;  u = u where the element mask trains, else 0;  w = w + u;  peft = update(peft, g,
    step)

Numerators and denominators are divided once, at the end, so that micro-batches, packing and sharding give what one big
batch gives.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.errors import FlagError
from research.peft import tree
from research.tasks.loss import Loss
from research.train.state import TrainState, merge

PyTree = Any
LossFn = Callable[[PyTree, PyTree, jax.Array | None], Loss]
Step = Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, jax.Array]]]
Over = Literal["map", "vmap"]
RESERVED = ("loss", "penalty", "grad_norm", "update_norm", "weight", "finite")
PENALTY = 2**31 - 1  # its place in the random stream, which no micro-batch reaches


def make_step(
    loss: LossFn,
    tx: optax.GradientTransformation,
    *,
    realise: Callable[[PyTree], PyTree] | None = None,
    penalty: Callable[[PyTree, jax.Array], jax.Array] | None = None,
    update: Callable[[PyTree, PyTree, jax.Array], PyTree] | None = None,
    rates: Callable[[PyTree], PyTree] | None = None,
    clip_norm: float | None = None,
) -> Step:
    """Returns `step(state, frozen, batch) -> (state, metrics)`; batch leaves are [M, B, ...] with M micro-batches.

    Args:
        realise: variables -> variables, before the loss and differentiated through.
        penalty: (variables, rng) -> [], added to the mean loss once a step.
        update: (added, grads, step) -> added, last of all: `added` is the whole `peft` subtree, trained and frozen
            leaves together, `grads` its clipped gradients with holes where nothing trains, `step` the number of steps
            before this one. Frozen leaves it changes live in `state.extra`.
        rates: variables -> factors multiplied into the updates (any number or array per trainable leaf).
        clip_norm: bound of the global norm over trainable leaves.

    Metrics are fp32 scalars: `loss` (without penalty), `penalty` if there is one, `grad_norm` (before clipping),
    `update_norm` (of u, what is added to the weights), `weight`, each metric of the task, and the bool `finite`. When
    loss, gradients or updates are not finite, everything but `state.step` comes back as it was. A batch of weight 0 has
    loss 0.

    Raises FlagError: clip_norm is not a finite number above 0.
    """
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise FlagError(f"clip_norm={clip_norm} must be a finite number above 0")

    def gradients(state: TrainState, frozen: PyTree, batch: PyTree, rng: jax.Array) -> tuple[PyTree, Loss]:
        """Sums over the micro-batches: gradients of `loss.sum`, and the Loss itself."""

        def numerator(trainable: PyTree, micro: PyTree, rng: jax.Array) -> tuple[jax.Array, Loss]:
            variables = merge(trainable, state.extra, frozen)
            out = loss(realise(variables) if realise else variables, micro, rng)
            return out.sum, out._replace(outputs=None)

        def one(index: jax.Array | int, micro: PyTree) -> tuple[PyTree, Loss]:
            (_, out), grads = jax.value_and_grad(numerator, has_aux=True)(
                state.trainable, micro, jax.random.fold_in(rng, index)
            )
            return jax.tree.map(_wide, (grads, out))

        count = len(jax.tree.leaves(batch)[0])
        if count == 1:
            return one(0, jax.tree.map(lambda x: x[0], batch))
        first = jax.tree.map(lambda x: x[0], batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0, first))
        add = lambda total, xs: (jax.tree.map(jnp.add, total, one(*xs)), None)  # noqa: E731
        return jax.lax.scan(add, zeros, (jnp.arange(count), batch))[0]

    def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        grads, total = gradients(state, frozen, batch, rng)
        if clash := set(total.metrics) & set(RESERVED):
            raise ValueError(f"a task may not name a metric {sorted(clash)}")
        metrics = {name: _mean(*pair) for name, pair in {"loss": (total.sum, total.weight), **total.metrics}.items()}
        grads = jax.tree.map(lambda g: _mean(g, total.weight), grads)

        if penalty:
            charge = lambda t: penalty(merge(t, state.extra, frozen), jax.random.fold_in(rng, PENALTY))  # noqa: E731
            metrics["penalty"], extra_grads = jax.value_and_grad(charge)(state.trainable)
            grads = jax.tree.map(jnp.add, grads, extra_grads)

        grads = _keep(state.mask, grads)
        norm = optax.tree.norm(grads)
        scale = 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g, w: (g * scale).astype(w.dtype), grads, state.trainable)

        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        if rates:
            factors = rates(state.variables(frozen))
            updates = jax.tree.map(
                lambda u, r: None if u is None else (u * r).astype(u.dtype), updates, factors, is_leaf=_hole
            )
        updates = _keep(state.mask, updates)
        moved = optax.tree.norm(jax.tree.map(_wide, updates))
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics.get("penalty", 0.0))
        finite &= jnp.isfinite(norm) & jnp.isfinite(moved)
        metrics |= {"grad_norm": norm, "update_norm": moved, "weight": total.weight, "finite": finite}
        trainable, extra = optax.apply_updates(state.trainable, updates), state.extra
        if update:
            added = update(tree.combine(trainable["peft"], extra["peft"]), grads["peft"], state.step)
            trainable, extra = _put(trainable, added), _put(extra, added)

        # `select` and not `cond`: XLA fuses it into the update, in place, and it is the identity bit for bit when
        # finite.
        new, old = (trainable, extra, opt_state), (state.trainable, state.extra, state.opt_state)
        trainable, extra, opt_state = jax.tree.map(lambda a, b: jax.lax.select(finite, a, b), new, old)
        state = state.replace(step=state.step + 1, trainable=trainable, extra=extra, opt_state=opt_state)
        return state, metrics

    return step


def over_seeds(step: Step, how: Over | None = None, shared_batch: bool = False) -> Step:
    """The same step for several runs at once.

    State leaves are [S, ...] (`state.stack`), batch leaves [S, M, B, ...] or, if `shared_batch`, [M, B, ...].

    The frozen base is one for all; what is frozen yet differs by run sits in `state.extra`. Metrics come out as [S].
    "map" runs one seed after the other inside one program, "vmap" all together. By default a CPU maps (there three
    seeds took 3.0 s by vmap, one 0.78) and an accelerator vmaps.
    """
    how = how or default_over()
    if how == "vmap":
        return jax.vmap(step, in_axes=(0, None, None if shared_batch else 0))

    def mapped(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        if shared_batch:
            return jax.lax.map(lambda s: step(s, frozen, batch), state)
        return jax.lax.map(lambda xs: step(xs[0], frozen, xs[1]), (state, batch))

    return mapped


def default_over() -> Over:
    """How several runs share a program on this backend."""
    return "map" if jax.default_backend() == "cpu" else "vmap"


def make_eval(
    loss: LossFn, *, realise: Callable[[PyTree], PyTree] | None = None, seeds: bool = False, how: Over | None = None
) -> Callable[..., dict[str, Any] | None]:
    """Returns `evaluate(state, frozen, batches, stop=None) -> means`; batch leaves are [B, ...], the loss gets no rng.

    `state` is a TrainState or anything with `trainable` and `extra`. Sums and weights stay on the device until the last
    batch. Means are floats, or arrays [S] when `seeds` (the batches are shared); `weight` is the weight of the loss.
    `stop()` is asked before each batch: when true, None is returned.
    """

    def part(variables: tuple[PyTree, PyTree], frozen: PyTree, batch: PyTree) -> dict[str, tuple]:
        whole = merge(*variables, frozen)
        out = loss(realise(whole) if realise else whole, batch, None)
        return jax.tree.map(_wide, {"loss": (out.sum, out.weight), **out.metrics})

    if not seeds:
        parts = part
    elif (how or default_over()) == "vmap":
        parts = jax.vmap(part, in_axes=(0, None, None))
    else:
        parts = lambda variables, frozen, batch: jax.lax.map(lambda v: part(v, frozen, batch), variables)  # noqa: E731
    parts, add = jax.jit(parts), jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=(0,))

    def evaluate(
        state: TrainState, frozen: PyTree, batches: Iterable[PyTree], stop: Callable[[], bool] | None = None
    ) -> dict[str, Any] | None:
        total = None
        for batch in batches:
            if stop and stop():
                return None
            new = parts((state.trainable, state.extra), frozen, batch)
            total = new if total is None else add(total, new)
        if total is None:
            raise ValueError("evaluation got no batch")
        sums = jax.device_get(total)
        means = {name: np.divide(s, np.where(w == 0, 1, w)) for name, (s, w) in sums.items()}
        means["weight"] = sums["loss"][1]
        return {name: float(x) if np.ndim(x) == 0 else np.asarray(x) for name, x in means.items()}

    return evaluate


def compile(
    step: Step, state: PyTree, frozen: PyTree, batch: PyTree, shardings: tuple | None = None
) -> jax.stages.Compiled:
    """Compiles ahead of time, donating the state. Arguments are arrays or shapes;

    `shardings` is (state, frozen, batch), prefixes allowed.
    """
    options = {} if shardings is None else {"in_shardings": shardings, "out_shardings": (shardings[0], None)}
    return jax.jit(step, donate_argnums=(0,), **options).lower(state, frozen, batch).compile()


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes per device of a compiled program: argument, output, temp, alias (outputs in donated arguments), peak."""
    stats = compiled.memory_analysis()
    out = {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in ("argument", "output", "temp", "alias")}
    return out | {"peak": out["argument"] + out["output"] + out["temp"] - out["alias"]}


def _hole(x: Any) -> bool:
    return x is None


def _wide(x: jax.Array) -> jax.Array:
    """Sums are kept in at least fp32."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / jnp.where(weight == 0, 1.0, weight)


def _keep(mask: PyTree, leaves: PyTree) -> PyTree:
    """Zeroes what a partly trained leaf must not move."""
    if mask is None:
        return leaves
    return jax.tree.map(lambda m, x: x if m is None else jnp.where(m, x, 0), mask, leaves, is_leaf=_hole)


def _put(part: PyTree, added: PyTree) -> PyTree:
    """Takes from `added` what `part` holds under `peft`."""
    new = jax.tree.map(lambda old, x: None if old is None else x, part["peft"], added, is_leaf=_hole)
    return {**part, "peft": new}
