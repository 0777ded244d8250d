"""What those methods share that choose single elements of the base from data: the node that holds the choice, the
choice of the highest scores, and a first phase of full fine-tuning.

    at first    peft {"reparam": {NAME: Elements(chosen=False)}}
    after `fit` peft {"reparam": {NAME: Elements(chosen={"layers": {"attn": {"q": {"kernel": bool[L, in, out]}}}})}}

The choice is the mask of what trains and takes no part in the model: `realise` takes it out, and no adapter stores it,
but the elements that it names and an index of four bytes for each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.errors import FlagError
from research.nn.sites import Node
from research.peft import tree
from research.peft.method import REPARAM, Method, PyTree, Sites, Variables, at_least, base_leaves, frozen


class Elements(Node):
    """chosen: bools in the base's structure, each broadcastable to its leaf; before `fit` one False for all of it."""

    chosen: Any
    kind: ClassVar[str] = REPARAM
    trained: ClassVar[tuple[str, ...]] = ()
    derived: ClassVar[bool] = True


def from_data(
    name: str,
    choose: Callable[..., PyTree],
    start: Callable[[Sites], PyTree] = lambda sites: jnp.zeros((), bool),
    mask: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Method:
    """The method in which those elements of the base train that `choose` marks.

    Args:
        name: of the method.
        choose: (rng, variables, loss, data) -> what the node holds after `fit`.
        start: sites -> what it holds before.
        mask: (what it holds, params) -> the mask of the base; default: what it holds.
    """

    def node(variables: Variables) -> Elements | None:
        return variables.get("peft", {}).get(REPARAM, {}).get(name)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return {REPARAM: {name: Elements(start(sites))}}

    def trainable(variables: Variables) -> PyTree:
        base_leaves(".*", variables)  # refuses a quantised base
        params, found = variables["params"], node(variables)
        if found is None:
            return frozen(variables)
        chosen = found.chosen
        if mask is not None:
            chosen = mask(chosen, params)
        elif not isinstance(chosen, dict):
            chosen = tree.constant(params, chosen)
        return frozen(variables) | {"params": chosen}

    def fit(rng: jax.Array, variables: Variables, loss: Callable, data: Callable) -> Variables:
        base_leaves(".*", variables)
        chosen = jax.tree.map(jnp.asarray, choose(rng, variables, loss, data))
        return variables | {"peft": {REPARAM: {name: Elements(chosen)}}}

    def realise(variables: Variables, sites: Sites) -> Variables:
        if node(variables) is None:
            return variables
        return variables | {"peft": {key: x for key, x in variables["peft"].items() if key != REPARAM}}

    return Method(init, trainable=trainable, fit=fit, realise=realise)


def share_of(fraction: float, size: int) -> int:
    """How many of `size` a fraction is, at least one."""
    return max(1, round(fraction * size))


def check_fraction(fraction: float) -> None:
    """FlagError where that is nothing, or everything."""
    if not 0 < fraction < 1:
        raise FlagError(f"fraction={fraction} is out of range: valid are 0 < fraction < 1, or --peft=full for 1.")


def check_phase(steps: int, learning_rate: float) -> None:
    """FlagError for a first phase that changes nothing."""
    at_least("steps", steps, 1)
    if not learning_rate > 0:
        raise FlagError(f"learning_rate={learning_rate} is out of range: it is above 0, such as 5e-5.")


def finite(scores: PyTree) -> PyTree:
    """The scores on the host; FlagError where they can't be ranked."""
    scores = jax.tree.map(lambda x: np.asarray(x, np.float32), scores)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(scores)):
        raise FlagError(
            "what shall train can't be chosen, since the loss or its gradient is not finite: "
            "lower the method's learning_rate, where it has one, or look for broken weights and data."
        )
    return scores


def highest(scores: PyTree, count: int) -> PyTree:
    """True for exactly `count` of all elements together, those of the highest scores; of equal ones those that come
    first in the tree's order.
    """
    leaves, structure = jax.tree.flatten(finite(scores))
    flat = np.concatenate([x.ravel() for x in leaves])
    least = np.partition(flat, flat.size - count)[flat.size - count]
    chosen = flat > least
    chosen[np.flatnonzero(flat == least)[: count - np.count_nonzero(chosen)]] = True
    parts = np.split(chosen, np.cumsum([x.size for x in leaves])[:-1])
    return jax.tree.unflatten(structure, [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)])


def changes(
    rng: jax.Array, variables: Variables, loss: Callable, data: Callable, steps: int, learning_rate: float
) -> PyTree:
    """|theta - theta_0| of the base after full fine-tuning, a head's with it, by Adam at a rate that falls to 0."""
    start = {key: variables[key] for key in ("params", "head") if key in variables}
    rest = {key: x for key, x in variables.items() if key not in start}
    tx = optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: PyTree, state: PyTree, batch: PyTree, rng: jax.Array) -> tuple[PyTree, PyTree]:
        def mean(trained: PyTree) -> jax.Array:
            return loss(rest | trained, batch, rng).mean()

        updates, state = tx.update(jax.grad(mean)(trained), state)
        return optax.apply_updates(trained, updates), state

    # In fp32, where the smallest steps count, and copies: the step takes its arguments' buffers.
    trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32), start)
    state = tx.init(trained)
    for i in range(steps):
        trained, state = step(trained, state, data(i), jax.random.fold_in(rng, i))
    return jax.tree.map(lambda new, old: jnp.abs(new - old), trained["params"], start["params"])
