"""Methods made of methods: `chain(lora(), prefix())` and `on_layers(lora(), "0-3")`, or `lora:layers=0-3+prefix` on the
command line.

A chain is the union of the added subtrees and the OR of the masks. Node keys carry the place in the chain, since jax
sorts dictionary keys:

    {"layers": {"attn": {"q": {"0_lora": On(Lora(...), on[L])}, "kv": {"1_prefix": Prefix(...)}}}}

A part never sees the other parts' nodes, nor its own number, nor `On`: its functions are lifted from its own tree to
the whole one.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError
from research.nn.on import On
from research.peft import tree
from research.peft.method import Method, PyTree, Sites, Variables, either, fold, frozen, is_node, trained_fields

Change = Callable[[PyTree], PyTree]


def lift(
    part: Method, down: Change, up: Change, rest: Change, collections: Sequence[str] = ("peft", "shared")
) -> Method:
    """The part on a whole subtree: it sees `down(whole)`, its result goes back by `up`, `rest(whole)` stays."""

    def view(variables: Variables) -> Variables:
        return variables | {k: down(variables[k]) for k in collections if k in variables}

    def back(whole: Variables, mine: Variables) -> Variables:
        found = [k for k in collections if k in whole or k in mine]
        return mine | {k: tree.merge_dicts(rest(whole.get(k, {})), up(mine.get(k, {}))) for k in found}

    def through(fn: Callable | None, at: int = 0) -> Callable | None:
        """Lifts a function whose argument number `at` is the variables, as its result is."""
        if fn is None:
            return None
        return lambda *args: back(args[at], fn(*args[:at], view(args[at]), *args[at + 1 :]))

    def trainable(variables: Variables) -> PyTree:
        return back(frozen(variables), (part.trainable or trained_fields)(view(variables)))

    def rates(variables: Variables) -> PyTree:
        return back(tree.constant(variables, 1.0), part.rates(view(variables)))

    def penalty(variables: Variables, rng: jax.Array) -> jax.Array:
        return part.penalty(view(variables), rng)

    def update(added: PyTree, grads: PyTree, step: jax.Array) -> PyTree:
        return tree.merge_dicts(rest(added), up(part.update(down(added), down(grads), step)))

    return Method(
        init=lambda rng, sites: up(part.init(rng, sites)),
        trainable=trainable,
        fit=through(part.fit, 1),
        realise=through(part.realise),
        penalty=part.penalty and penalty,
        update=part.update and update,
        rates=part.rates and rates,
        task=part.task,
        identity=part.identity,
    )


def chain(*parts: Method) -> Method:
    """One method that does what all parts do, in order. FlagError where two parts train the same base leaf."""
    width = len(str(len(parts) - 1))
    numbers = [f"{i:0{width}d}_" for i in range(len(parts))]
    lifted = [lift(part, *_numbered(number)) for part, number in zip(parts, numbers, strict=True)]

    def with_(name: str) -> list[Method]:
        return [part for part in lifted if getattr(part, name) is not None]

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return tree.merge_dicts(*(p.init(fold(rng, n), sites) for p, n in zip(lifted, numbers, strict=True)))

    def trainable(variables: Variables) -> PyTree:
        masks = [part.trainable(variables) for part in lifted]
        for j, later in enumerate(masks):
            for i, earlier in enumerate(masks[:j]):
                _refuse_overlap(i, earlier["params"], j, later["params"])
        return either(*masks)

    def fit(rng: jax.Array, variables: Variables, *data: Any) -> Variables:
        for part, number in zip(lifted, numbers, strict=True):
            variables = part.fit(fold(rng, number), variables, *data) if part.fit else variables
        return variables

    def realise(variables: Variables, sites: Sites) -> Variables:
        for part in with_("realise"):
            variables = part.realise(variables, sites)
        return variables

    def penalty(variables: Variables, rng: jax.Array) -> jax.Array:
        both = zip(lifted, numbers, strict=True)
        return sum((p.penalty(variables, fold(rng, n)) for p, n in both if p.penalty), jnp.zeros(()))

    def update(added: PyTree, grads: PyTree, step: jax.Array) -> PyTree:
        for part in with_("update"):
            added = part.update(added, grads, step)
        return added

    def rates(variables: Variables) -> PyTree:
        return jax.tree.map(
            lambda *xs: functools.reduce(operator.mul, xs), *(p.rates(variables) for p in with_("rates"))
        )

    def task(loss: Callable) -> Callable:
        for part in with_("task"):
            loss = part.task(loss)
        return loss

    made = {f.__name__: f for f in (fit, realise, penalty, update, rates, task) if with_(f.__name__)}
    return Method(init, trainable, identity=all(p.identity for p in parts), **made)


def _numbered(number: str) -> tuple[Change, Change, Change]:
    """Down to, and up from, the nodes of one part; and the nodes of the others."""
    return (
        lambda added: _rename(_filter(added, lambda k: k.startswith(number)), lambda k: k.removeprefix(number)),
        lambda added: _rename(added, lambda k: number + k),
        lambda added: _filter(added, lambda k: not k.startswith(number)),
    )


def _refuse_overlap(i: int, one: PyTree, j: int, two: PyTree) -> None:
    found = tree.paths(two)
    for path, m in tree.paths(one).items():
        known = not any(isinstance(x, jax.ShapeDtypeStruct) for x in (m, found[path]))
        if known and np.any(np.logical_and(m, found[path])):
            raise FlagError(
                f"parts {i + 1} and {j + 1} of the chain both train {path}: leave it to one of them, "
                "or give each its own layers, such as layers=0-1."
            )


def on_layers(method: Method, layers: str) -> Method:
    """The method in some layers only; what it has outside the layers (virtual tokens, a shared matrix) stays.

    Args:
        layers: numbers and ranges, "0-3|6", of each stack. Of the base's leaves only those layers' train.
    Raises FlagError for layers that the model has not, and where the method has nothing in layers.
    """
    numbers = _parse(layers)
    lifted = lift(method, _unwrap, lambda added: _wrap(added, numbers), lambda added: {}, ("peft",))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        depth = max((_depth(path, site.stack) for path, site in sites.items() if tree.stack_name(path)), default=0)
        if max(numbers) >= depth:
            raise FlagError(f"layers={layers} is out of range: the model has layers 0-{depth - 1}.")
        return lifted.init(rng, sites)

    def chosen(path: str, mask: Any, leaf: Any) -> Any:
        """The mask of a leaf inside the layers, restricted to the chosen ones."""
        first = tree.stack_name(path)
        if mask is False or isinstance(mask, jax.ShapeDtypeStruct):
            return mask
        if first == "layers":
            on = np.isin(np.arange(leaf.shape[0]), numbers).reshape(-1, *(1,) * (leaf.ndim - 1))
            return on if mask is True else np.logical_and(mask, on)
        if first:
            return mask if int(first.removeprefix("layers_")) in numbers else False
        return mask if path.startswith("peft/") else False

    def trainable(variables: Variables) -> PyTree:
        mine = variables | {"peft": _unwrap(variables.get("peft", {}))}
        mask = (method.trainable or trained_fields)(mine)
        mask = tree.map_with_path(chosen, mask, mine)
        return mask | {"peft": _cover(mask["peft"], variables.get("peft", {}), False)}

    def rates(variables: Variables) -> PyTree:
        found = method.rates(variables | {"peft": _unwrap(variables.get("peft", {}))})
        return found | {"peft": _cover(found["peft"], variables.get("peft", {}), 1.0)}

    return lifted._replace(init=init, trainable=trainable, rates=method.rates and rates)


def _parse(layers: str) -> tuple[int, ...]:
    """ "0-3|6" -> (0, 1, 2, 3, 6)."""
    try:
        ends = [[int(end) for end in part.split("-")] for part in layers.split("|")]
        numbers = sorted({n for part in ends for n in range(part[0], part[-1] + 1) if len(part) <= 2})
    except ValueError:
        numbers = []
    if not numbers:
        raise FlagError(f"layers={layers} names no layers. Valid: 0-3, or 0-3|6.")
    return tuple(numbers)


def _depth(path: str, stack: Any) -> int:
    first = tree.stack_name(path)
    return stack.shape[0] if first == "layers" else int(first.removeprefix("layers_")) + 1


def _wrap(added: PyTree, numbers: tuple[int, ...]) -> PyTree:
    """Puts every node inside the layers into `On`."""

    def wrapped(path: str, node: Any) -> Any:
        first = tree.stack_name(path)
        if not is_node(node) or not first:
            return node
        if first != "layers":
            return On(node, nn.LogicallyPartitioned(jnp.asarray(int(first[7:]) in numbers), ()), numbers)
        depth = jax.tree.leaves(nn.unbox(node))[0].shape[0]
        on = jnp.asarray(np.isin(np.arange(depth), numbers))
        return On(node, nn.LogicallyPartitioned(on, ("layers",)), numbers)

    boxed = any(isinstance(x, nn.LogicallyPartitioned) for x in jax.tree.leaves(added, is_leaf=_boxed))
    out = tree.map_with_path(wrapped, added, is_leaf=is_node)
    return out if boxed else nn.unbox(out)


def _boxed(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _unwrap(added: PyTree) -> PyTree:
    return jax.tree.map(lambda node: node.node if isinstance(node, On) else node, added, is_leaf=is_node)


def _cover(values: PyTree, added: PyTree, on: Any) -> PyTree:
    """Puts a tree of masks or factors into the `On`s of the added subtree it is for."""
    put = lambda node, value: node.replace(node=value, on=on) if isinstance(node, On) else value  # noqa: E731
    return jax.tree.map(put, added, values, is_leaf=is_node)


def _rename(added: PyTree, key: Callable[[str], str]) -> PyTree:
    """Renames the dictionary keys that hold nodes."""
    if not isinstance(added, dict):
        return added
    return {key(k) if is_node(v) else k: _rename(v, key) for k, v in added.items()}


def _filter(added: PyTree, keep: Callable[[str], bool]) -> PyTree:
    """Drops the nodes whose key fails `keep`, and the dictionaries left empty."""
    out = {}
    for k, v in added.items():
        if is_node(v):
            if keep(k):
                out[k] = v
        elif inner := _filter(v, keep):
            out[k] = inner
    return out
