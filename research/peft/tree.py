"""Pytree surgery: paths, partition into trainable and frozen with None-holes, and combine (after equinox).

    variables = {"params": {"q": {"kernel": W}}, "peft": {"q": {"lora": Lora(a, b, scale)}}}
    mask      = {"params": {"q": {"kernel": False}}, "peft": {"q": {"lora": Lora(True, True, False)}}}
    trainable = {"params": {"q": {"kernel": None}}, "peft": {"q": {"lora": Lora(a, b, None)}}}
    frozen    = {"params": {"q": {"kernel": W}}, "peft": {"q": {"lora": Lora(None, None, scale)}}}

`jax.grad`, optax and Orbax see only the leaves that are there: no gradient and no optimiser state exists for a hole.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

PyTree = Any


def path_string(path: tuple) -> str:
    """Turns a jax key path into "layers/attn/q/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def paths(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns {path: leaf} in the tree's own order; holes are left out."""
    return {path_string(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]}


def stack_name(path: str) -> str:
    """What a path names of a layer stack: "layers" where it is scanned, "layers_3" in a layer of an unrolled one, and
    "" outside.
    """
    return next((name for name in path.split("/") if re.fullmatch(r"layers(_\d+)?", name)), "")


def layer_paths(path: str, leaf: Any) -> list[str]:
    """The leaf's path in each layer of an unrolled stack; of a leaf outside the stack its own."""
    if stack_name(path) != "layers":
        return [path]
    return [path.replace("layers", f"layers_{i}", 1) for i in range(leaf.shape[0])]


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree, is_leaf=None) -> PyTree:
    """`jax.tree.map` whose function takes the path string first."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: fn(path_string(p), *x), tree, *rest, is_leaf=is_leaf)


def whole(leaf: Any) -> np.ndarray:
    """A leaf on the host. One whose parts lie with several processes is gathered: all of them call it, in one order."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        from jax.experimental import multihost_utils

        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def trains(mask_leaf: Any) -> bool:
    """A mask leaf is a bool, or a bool array, broadcast to the leaf, where part of it trains: then the whole leaf is
    trainable. So it is where the array is not known yet but its shape.
    """
    return isinstance(mask_leaf, jax.ShapeDtypeStruct) or bool(np.any(np.asarray(mask_leaf)))


def partition(variables: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """Splits `variables` into (trainable, frozen), each with None where the other has the leaf."""
    trainable = jax.tree.map(lambda x, m: x if trains(m) else None, variables, mask)
    frozen = jax.tree.map(lambda x, m: None if trains(m) else x, variables, mask)
    return trainable, frozen


def combine(*parts: PyTree) -> PyTree:
    """Fills the holes of the first tree from the others: `combine(*partition(v, mask)) == v`."""
    return jax.tree.map(lambda *xs: next((x for x in xs if x is not None), None), *parts, is_leaf=lambda x: x is None)


def constant(tree: PyTree, value: Any) -> PyTree:
    """Returns a tree of the same structure with `value` at every leaf."""
    return jax.tree.map(lambda _: value, tree)


def merge_dicts(*trees: PyTree) -> PyTree:
    """Union of nested dicts with disjoint leaves; a leaf claimed twice raises ValueError with its path."""

    def union(a: PyTree, b: PyTree, path: str) -> PyTree:
        if not (isinstance(a, dict) and isinstance(b, dict)):
            raise ValueError(path)
        out = dict(a)
        for key, value in b.items():
            out[key] = union(out[key], value, f"{path}/{key}") if key in out else value
        return out

    result: PyTree = {}
    for tree in trees:
        result = union(result, tree, "")
    return result


def unflatten(flat: dict[str, Any]) -> PyTree:
    """The inverse of `paths` for trees of plain dicts."""
    tree: PyTree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def count(tree: PyTree, mask: PyTree | None = None) -> int:
    """Number of array elements (of those the mask lets train); works on shapes alone and never overflows."""
    if mask is None:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))

    def size(x: Any, m: Any) -> int:
        if isinstance(m, jax.ShapeDtypeStruct) or not np.ndim(m):
            return math.prod(x.shape) * trains(m)
        return int(np.sum(np.asarray(m))) * (math.prod(x.shape) // math.prod(np.shape(m)))

    return sum(jax.tree.leaves(jax.tree.map(size, tree, mask)))


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
