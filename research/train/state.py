"""What a training run is made of: everything that changes, or that one run of several side by side has to itself.

    variables = combine(state.trainable, state.extra, frozen)

    trainable  leaves that are differentiated; holes (None) elsewhere
    extra      frozen leaves outside the base (`scale`, `on`, masks, moving averages of a method): a method's `update`
               may change them, and on a leading seed axis they may differ from run to run
    mask       bool arrays at leaves that train in part, else holes (None if there are none)
    frozen     the base. Not part of the state: shared by all runs, never donated, never saved

All have the structure of `variables`, so optax, `jax.grad` and the checkpoint see just the leaves that are there.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.peft import tree

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """`step` int32 [] counts the batches seen; `rng` is a typed key []. With seeds all leaves are [S, ...]."""

    step: jax.Array
    trainable: PyTree
    extra: PyTree
    opt_state: PyTree
    rng: jax.Array
    mask: PyTree = None

    def variables(self, frozen: PyTree) -> PyTree:
        """The whole tree, as a model wants it."""
        return merge(self.trainable, self.extra, frozen)


def merge(trainable: PyTree, extra: PyTree, frozen: PyTree) -> PyTree:
    """Inverse of `split`; `extra` may be None."""
    parts = (trainable, frozen) if extra is None else (trainable, extra, frozen)
    return tree.combine(*parts)


def split(variables: PyTree, mask: PyTree, base: Sequence[str] = ("params",)) -> tuple[PyTree, PyTree, PyTree]:
    """Splits a dict of collections into (trainable, extra, frozen).

    What doesn't train goes to `frozen` in the collections named by `base`, else to `extra`.
    """
    trainable, rest = tree.partition(variables, mask)
    holes = jax.tree.map(lambda _: None, variables)
    extra = {name: holes[name] if name in base else rest[name] for name in rest}
    frozen = {name: rest[name] if name in base else holes[name] for name in rest}
    return trainable, extra, frozen


def split_masks(masks: Sequence[PyTree]) -> tuple[PyTree, list[PyTree]]:
    """Of the masks of several runs of one method: which leaves train in any run, as bools, and for each run the bool
    arrays of the leaves that train in part in some run, all of one shape, with holes elsewhere.
    """

    def partly(*leaves: Any) -> list:
        if all(np.ndim(m) == 0 or np.all(m) for m in leaves):
            return [None] * len(leaves)
        ndim = max(np.ndim(m) for m in leaves)
        wide = [m if np.ndim(m) else np.full((1,) * ndim, m) for m in leaves]
        shape = np.broadcast_shapes(*(np.shape(m) for m in wide))
        return [jnp.array(jnp.broadcast_to(m, shape)) for m in wide]

    either = jax.tree.map(lambda *leaves: any(tree.trains(m) for m in leaves), *masks)
    arrays = jax.tree.map(partly, *masks)
    pick = lambda i: jax.tree.map(lambda found: found[i], arrays, is_leaf=lambda x: isinstance(x, list))  # noqa: E731
    elements = [pick(i) for i in range(len(masks))]
    return either, elements if jax.tree.leaves(elements) else [None] * len(masks)


def create(
    trainable: PyTree, tx: optax.GradientTransformation, rng: jax.Array, extra: PyTree = None, mask: PyTree = None
) -> TrainState:
    """A state at step 0.

    All leaves are copied: the step donates them, and a method that trains base leaves must not delete the base's
    buffers. Of `mask`, which has the structure of the variables, holes allowed, only bool arrays that are partly False
    (or traced) are kept. They are part of the state, not constants of the program, since they are as large as the leaf,
    differ by run and, where they come from gradients, must be there again after a resume.
    """
    trainable, extra, rng = jax.tree.map(jnp.copy, (trainable, extra, rng))
    if mask is not None:
        whole = lambda m: not isinstance(m, jax.core.Tracer) and np.all(m)  # noqa: E731
        partly = lambda w, m: jnp.array(m) if w is not None and np.ndim(m) and not whole(m) else None  # noqa: E731
        mask = jax.tree.map(partly, trainable, mask, is_leaf=lambda x: x is None)
        mask = mask if jax.tree.leaves(mask) else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, extra, jax.tree.map(jnp.copy, tx.init(trainable)), rng, mask)


def stack(states: Sequence[TrainState]) -> TrainState:
    """Puts several runs on a leading axis [S], for `step.over_seeds`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def take(state: PyTree, seed: int) -> PyTree:
    """Returns run number `seed` of a stacked state (or of any stacked tree)."""
    return jax.tree.map(lambda x: x[seed], state)
