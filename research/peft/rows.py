"""One batch whose rows use different adapters of one method, in one program.

    own, common = stack([first, second, third])          # leaves [A, ...] and the rest, holes where the other has it
    y = apply_rows(apply, own, common, ids, tokens)       # row b of [B, T] sees adapter ids[b]
    y = apply_rows(apply, own, common, [0, 2, -1], tokens, base={"params": base})       # the last row: the bare base

What the adapters have in common, the frozen base above all, is kept once and never copied. Each row gathers its
adapter's leaves and is applied as a batch of one under `vmap`, so that nothing here knows a method. To apply adapters,
realise them first (`peft.realised`): a prefix's MLP then runs once, and not for every row. To train them, stack what
they are made of with the mask of what trains, and realise inside the function.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import ModelError
from research.peft import tree
from research.peft.method import PyTree, Variables

BASE = -1  # the id of the bare base


def stack(adapters: Sequence[Variables], mask: PyTree | None = None) -> tuple[Variables, Variables]:
    """Puts adapters on a leading axis: (own, common), as `tree.partition` would split them.

    A leaf that all adapters have bit for bit is common. Without a mask that is asked of every leaf, so another set of
    adapters may be another program.

    Args:
        adapters: variables of one structure, on one base.
        mask: what trains (`peft.mask`); such a leaf is never common, and of `params` nothing else may differ.
    Raises ModelError where the adapters are not of one structure, or not on one base.
    """
    if not adapters:
        raise ModelError("there is no adapter to stack: give at least one.")
    for i, other in enumerate(adapters[1:], 1):
        _refuse_unlike(adapters[0], other, i)

    def own(path: str, trains: Any, *leaves: Any) -> Any:
        if tree.trains(trains) or not all(same(leaves[0], x) for x in leaves[1:]):
            if mask is not None and path.startswith("params/") and not tree.trains(trains):
                raise ModelError(f"the adapters have different bases: {path} does not train and yet differs.")
            return jnp.stack(leaves)
        return None

    trains = tree.constant(adapters[0], False) if mask is None else mask
    stacked = tree.map_with_path(own, trains, *adapters)
    holes = lambda x: x is None  # noqa: E731
    return stacked, jax.tree.map(lambda s, x: x if s is None else None, stacked, adapters[0], is_leaf=holes)


def apply_rows(
    fn: Callable[..., PyTree], own: Variables, common: Variables, ids: Any, *args: PyTree, base: Variables | None = None
) -> PyTree:
    """fn(variables, *args) where row b has the variables of adapter ids[b]; leaves [B, ...] in and out.

    Args:
        fn: is called with batches of one row, and must not mix rows. Dropout keys are arguments like others, [B] keys
            that it sees as [1].
        own, common: from `stack`.
        ids: int [B]. -1 is the bare base: fn(base, *args), computed only where there is such a row. It is a program of
            its own where `fn` is compiled and this is not, and then equal bit for bit; inside a larger program XLA may
            round it otherwise.
        args: leaves [B, ...].
        base: the variables of rows with id -1.
    Raises ModelError for an id without an adapter; under `jit`, where ids have no values, such a row is NaN.
    """
    leaves, traced = jax.tree.leaves(own), isinstance(ids, jax.core.Tracer)
    if not traced:
        _refuse_unknown(np.asarray(ids), leaves[0].shape[0] if leaves else None, base)
    ids = jnp.asarray(ids)

    def row(index: jax.Array, *args: PyTree) -> PyTree:
        mine = jax.tree.map(lambda x: x.at[index].get(mode="fill"), own)
        out = fn(tree.combine(mine, common), *jax.tree.map(lambda x: x[None], args))
        return jax.tree.map(lambda x: x[0], out)

    # A base row borrows adapter 0, so that it stays finite; an unknown one is out of range: NaN.
    unknown = jnp.iinfo(ids.dtype).max
    index = jnp.where(ids >= 0, ids, unknown if base is None else jnp.where(ids == BASE, 0, unknown))
    out, bare = jax.vmap(row)(index, *args), ids == BASE
    if base is None or not (traced or jnp.any(bare)):
        return out

    def with_base() -> PyTree:
        choose = lambda x, y: jnp.where(bare.reshape(-1, *(1,) * (x.ndim - 1)), y, x)  # noqa: E731
        return jax.tree.map(choose, out, fn(base, *args))

    return jax.lax.cond(jnp.any(bare), with_base, lambda: out) if traced else with_base()


def same(one: Any, two: Any) -> bool:
    """Whether two leaves are one array, or equal bit for bit."""
    if one is two:
        return True
    bits = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8)  # noqa: E731
    return one.dtype == two.dtype and one.shape == two.shape and np.array_equal(bits(one), bits(two))


def _refuse_unlike(first: Variables, other: Variables, number: int) -> None:
    """ModelError that names what adapter `number` has otherwise than adapter 0."""
    shapes, others = (
        {path: (x.shape, str(x.dtype)) for path, x in tree.paths(variables).items()} for variables in (first, other)
    )
    for path in shapes | others:
        one, two = shapes.get(path), others.get(path)
        if one != two:
            told = [("no such leaf" if x is None else f"{x[1]}{list(x[0])}") for x in (one, two)]
            raise ModelError(
                f"adapters 0 and {number} are not of one specification: {path} is {told[0]} and {told[1]}. "
                "Stack adapters of one method with the same options."
            )
    if jax.tree.structure(first) != jax.tree.structure(other):
        raise ModelError(
            f"adapters 0 and {number} are not of one specification: an option differs that is no array, such as "
            "dropout or layers. Stack adapters of one method with the same options."
        )


def _refuse_unknown(ids: np.ndarray, size: int | None, base: Variables | None) -> None:
    least = 0 if base is None else BASE
    for i, id_ in enumerate(ids):
        if id_ < least or (size is not None and id_ >= size):
            known = "0" if size in (None, 1) else f"0 to {size - 1}"
            more = ", or give base= for id -1" if id_ == BASE else ""
            raise ModelError(f"row {i} has id {id_}, which no adapter has. Valid: {known}{more}.")
