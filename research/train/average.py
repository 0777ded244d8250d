"""The moving average of a run's trainables, kept in the optimiser's state: checkpoints, meshes and resumed runs have it
without a line of their own.

    tx = averaged(tx, 0.999);   ...train...;   sampled = read(state, 0.999)

An update finds in `params` what the step before left, when learning-rate factors, masks and a method's own `update` had
their say. So it is those that are averaged, one step late, and `read` adds the last. The rule is `diffusion.ema`'s.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.diffusion import ema
from research.train.state import TrainState

PyTree = Any


class Averaged(NamedTuple):
    """`count` int32 [] of updates; `average` in fp32, with the trainables' structure; `inner`: the optimiser's own."""

    count: jax.Array
    average: PyTree
    inner: PyTree


def averaged(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """The same updates, with the average of what they lead to. decay 0 keeps the last parameters alone."""

    def init(params: PyTree) -> Averaged:
        return Averaged(jnp.zeros((), jnp.int32), jax.tree.map(_wide, params), tx.init(params))

    def update(updates: PyTree, state: Averaged, params: PyTree) -> tuple[PyTree, Averaged]:
        updates, inner = tx.update(updates, state.inner, params)
        return updates, Averaged(state.count + 1, _with_last(state, params, decay), inner)

    return optax.GradientTransformation(init, update)


def read(state: TrainState, decay: float) -> TrainState:
    """The state with the average, of all steps so far, for its trainables, in their dtypes."""
    return state.replace(trainable=_read(state.opt_state, state.trainable, decay))


@functools.partial(jax.jit, static_argnums=2)
def _read(state: Averaged, params: PyTree, decay: float) -> PyTree:
    return jax.tree.map(lambda a, x: a.astype(x.dtype), _with_last(state, params, decay), params)


def _with_last(state: Averaged, params: PyTree, decay: float) -> PyTree:
    """The average with `params`, which `count` updates made; before the first there is nothing to add."""
    added = ema.update(state.average, params, state.count - 1, decay)
    return jax.tree.map(lambda new, old: jnp.where(state.count > 0, new, old), added, state.average)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
