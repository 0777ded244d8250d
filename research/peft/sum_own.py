"""Weighted sums that a method can hold itself: its own arrays are summed, or put side by side. See `arithmetic`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import ModelError
from research.nn.on import On
from research.nn.param import dense
from research.peft.dora import Dora, norms
from research.peft.fourierft import FourierFt
from research.peft.hira import Hira
from research.peft.houlsby import Bottleneck
from research.peft.ia3 import Scale, ScaleInput
from research.peft.method import PyTree
from research.peft.parallel import LearntParallel, Parallel
from research.peft.rows import same
from research.peft.shira import Shira
from research.peft.sum_rules import Rule, by_layer
from research.peft.tree import layer_paths

# Nodes whose change is linear in one field, with the field's value that changes nothing; the other fields are fixed.
FIELDS = {Scale: ("l", 1.0), ScaleInput: ("l", 1.0), Shira: ("values", 0.0), FourierFt: ("spectrum", 0.0)}


class At(NamedTuple):
    """One adapter's node at a site, with what all layers share."""

    key: str
    node: Any
    shared: Any

    @property
    def bare(self) -> Any:
        return bare(self.node)


class Part(NamedTuple):
    """One part of a chain: its number ("0_", or "" where there is no chain), what each adapter has of it at each site,
    and its nodes that sit at no site.
    """

    number: str
    sites: dict[str, list[At | None]]
    others: list[Any]


def bare(node: Any) -> Any:
    return node.node if isinstance(node, On) else node


def beside(params: PyTree, path: str) -> PyTree:
    """What the base has at a site, if anything."""
    for key in path.split("/"):
        params = params.get(key, {})
    return params


def one_layer(values: PyTree, path: str, i: int) -> PyTree:
    return jax.tree.map(lambda x: x[i], values) if path.startswith("layers/") else values


def stacked(path: str, layers: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *x: jnp.stack(x), *layers) if path.startswith("layers/") else layers[0]


def kept(part: Part, rule: Rule) -> Callable[[PyTree], dict[str, Any]] | None:
    """What sums the part within its own method, as params -> nodes; None where that can't hold the sum."""
    there = {path: [at for at in found if at is not None] for path, found in part.sites.items()}
    alike = [{(at.key, jax.tree.structure(at.node)) for at in found} for found in there.values()]
    kinds = {type(at.bare) for found in there.values() for at in found}
    if not kinds or any(len(forms) > 1 for forms in alike):  # other layers, another activation, another method
        return None
    if kinds <= {Scale, ScaleInput} or (rule.exact and kinds <= FIELDS.keys()):
        if not all(_same_but_one_field(found) for found in there.values()):
            return None
        one = _fields
    elif rule.exact and kinds == {Dora}:
        one = _doras
    elif rule.exact and kinds == {Hira}:
        ranks = {sum(at.bare.a.shape[-1] for at in found) for found in there.values()}
        if len(ranks) > 1 or min(ranks) > min(map(_smaller_side, there.values())):
            return None
        one = _hiras
    elif rule.exact and (kinds == {Bottleneck} or kinds <= {Parallel, LearntParallel}):
        one = _wider
    else:
        return None

    def summed(params: PyTree) -> dict[str, Any]:
        out = {}
        for path, found in part.sites.items():
            first = there[path][0]
            new = one([None if at is None else at.bare for at in found], path, params, rule)
            out[f"{path}/{first.key}"] = first.node.replace(node=new) if isinstance(first.node, On) else new
        return out

    return summed


def _same_but_one_field(found: Sequence[At]) -> bool:
    name, _ = FIELDS[type(found[0].bare)]
    blank = [at.bare.replace(**{name: None}) for at in found]
    return all(jax.tree.all(jax.tree.map(same, blank[0], other)) for other in blank[1:])


def _smaller_side(found: Sequence[At]) -> int:
    return min(found[0].bare.a.shape[-2], found[0].bare.b.shape[-1])


def _there(nodes: Sequence[Any], rule: Rule) -> list[tuple[float, Any]]:
    return [(weight, node) for weight, node in zip(rule.weights, nodes, strict=True) if node is not None]


def _fields(nodes: Sequence[Any], path: str, params: PyTree, rule: Rule) -> Any:
    """The field that the change is linear in is summed."""
    first = next(node for node in nodes if node is not None)
    name, neutral = FIELDS[type(first)]
    old = getattr(first, name)
    changes = [np.zeros(old.shape) if n is None else np.asarray(getattr(n, name), np.float64) - neutral for n in nodes]
    return first.replace(**{name: jnp.asarray(neutral + by_layer(rule, changes, path), old.dtype)})


def _doras(nodes: Sequence[Any], path: str, params: PyTree, rule: Rule) -> Dora:
    """W + sum w ((W + a b) diag(d) - W), with d = m / ||W + a b||, is (W + A B) diag(c): c = 1 + sum w (d - 1), A all
    w a, B all b diag(d / c). That is a DoRA of magnitudes c ||W + A B||.
    """
    kernel, sums = beside(params, path)["kernel"], []
    for i in range(len(layer_paths(path, jax.tree.leaves(kernel)[0]))):
        w = dense(one_layer(kernel, path, i), jnp.float32)
        found = [(weight, one_layer(node, path, i)) for weight, node in _there(nodes, rule)]
        shares = [n.m / norms(w, n.a * n.scale, n.b) for _, n in found]
        c = 1 + sum(weight * (share - 1) for (weight, _), share in zip(found, shares, strict=True))
        if jnp.min(jnp.abs(c)) < 1e-6:
            raise ModelError(f"{path}: these weights cancel the magnitude of a column: choose others, or how=svd.")
        a = jnp.concatenate([weight * n.a * n.scale for weight, n in found], axis=1)
        b = jnp.concatenate([n.b * share for (_, n), share in zip(found, shares, strict=True)], axis=0) / c
        if a.shape[1] > min(w.shape):  # more than the product can have: one of its factors is the identity
            a, b = (a @ b, jnp.eye(w.shape[1])) if w.shape[1] <= w.shape[0] else (jnp.eye(w.shape[0]), a @ b)
        sums.append(Dora(a, b, c * norms(w, a, b), jnp.ones(())))
    return stacked(path, sums)


def _hiras(nodes: Sequence[Any], path: str, params: PyTree, rule: Rule) -> Hira:
    """W o (A1 B1) + W o (A2 B2) = W o ([A1, A2] [B1; B2])."""
    found = _there(nodes, rule)
    a = jnp.concatenate([weight * n.a * n.scale[..., None, None] for weight, n in found], axis=-1)
    return Hira(a, jnp.concatenate([n.b for _, n in found], axis=-2), jnp.ones_like(found[0][1].scale))


def _wider(nodes: Sequence[Any], path: str, params: PyTree, rule: Rule) -> Any:
    """Bottlenecks side by side add the weighted sum of what each adds."""
    found = _there(nodes, rule)
    first, scaled = found[0][1], isinstance(found[0][1], Parallel)
    inner = [n.adapter if scaled else n for _, n in found]
    sizes = [weight * n.scale if scaled else jnp.asarray(weight) for weight, n in found]
    wide = inner[0].replace(
        down=jnp.concatenate([n.down for n in inner], axis=-1),
        down_bias=jnp.concatenate([n.down_bias for n in inner], axis=-1),
        up=jnp.concatenate([s[..., None, None] * n.up for s, n in zip(sizes, inner, strict=True)], axis=-2),
        up_bias=sum(s[..., None] * n.up_bias for s, n in zip(sizes, inner, strict=True)),
    )
    return first.replace(adapter=wide, scale=jnp.ones_like(first.scale)) if scaled else wide
