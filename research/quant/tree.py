"""Quantising the kernels of a parameter tree by name, and what that costs in accuracy.

    {"layers": {"q": {"kernel": W[L, in, out], "bias": b}}}  ->  {"layers": {"q": {"kernel": NF4 | Int8, "bias": b}}}

The layer dequantises where it multiplies, inside the scan's body, so that one layer at a time is dense.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.errors import FlagError, did_you_mean
from research.nn.param import dense, is_quantised
from research.peft.method import matcher
from research.peft.tree import map_with_path, paths
from research.quant import int8, nf4

PyTree = Any
KINDS = {"int8": int8, "nf4": nf4}
LAYERS = r"layers(_\d+)?/.*/kernel"


class Error(NamedTuple):
    """max: the largest |W' - W|; frobenius: |W' - W| / |W| in the Frobenius norm. Scalars."""

    max: jax.Array
    frobenius: jax.Array


def quantise_tree(params: PyTree, kind: str = "int8", targets: str = LAYERS) -> PyTree:
    """Quantises the kernels whose path matches `targets`; everything else keeps its buffers.

    Raises FlagError for an unknown kind or where nothing matches.
    """
    return _map(params, _kind(kind).quantise, targets)


def quantise_axes(axes: PyTree, kind: str = "int8", targets: str = LAYERS) -> PyTree:
    """The logical axes of the quantised tree from the base's."""
    return _map(axes, _kind(kind).axes_of, targets, is_leaf=lambda x: isinstance(x, tuple))


def dequantise_tree(params: PyTree, dtype: str = "float32") -> PyTree:
    """The tree with its quantised leaves as arrays; everything else keeps its buffers."""
    return jax.tree.map(lambda x: dense(x, dtype) if is_quantised(x) else x, params, is_leaf=is_quantised)


def errors(params: PyTree, others: PyTree) -> dict[str, Error]:
    """{path: Error} of the leaves of `others` against `params`, either of which may be quantised.

    A merge's error is `errors(merged onto the float base, merged onto the quantised one)`: a merge adds the same to
    both, so it is the quantisation's own.
    """
    theirs = paths(others, is_leaf=is_quantised)
    return {path: error(w, theirs[path]) for path, w in paths(params, is_leaf=is_quantised).items()}


def error(w: Any, other: Any) -> Error:
    """How far `other` is from `w`; arrays or quantised nodes of one shape."""
    w, other = dense(w, jnp.float32), dense(other, jnp.float32)
    norm = jnp.linalg.norm(w.ravel())
    return Error(jnp.max(jnp.abs(other - w)), jnp.linalg.norm((other - w).ravel()) / jnp.where(norm == 0, 1.0, norm))


def _kind(name: str) -> Any:
    if name not in KINDS:
        raise FlagError(f"unknown quantisation {name!r}.{did_you_mean(name, KINDS)}")
    return KINDS[name]


def _map(tree: PyTree, fn: Any, targets: str, is_leaf: Any = None) -> PyTree:
    matches = matcher(targets)
    found = [path for path in paths(tree, is_leaf=is_leaf) if matches(path)]
    if not found:
        near = did_you_mean(targets, (p for p in paths(tree, is_leaf=is_leaf) if p.endswith("kernel")))
        raise FlagError(f"no kernel matches {targets!r}.{near}")
    return map_with_path(lambda path, leaf: fn(leaf) if matches(path) else leaf, tree, is_leaf=is_leaf)
