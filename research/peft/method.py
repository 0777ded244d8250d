"""What a PEFT method is: pure functions on pytrees, as an optax transform is.

    sites = peft.sites(model)                      # {"layers/attn/q": Site("linear", (D, H*K), ...)}
    added = peft.init(method, rng, sites)          # {"layers": {"attn": {"q": {"lora": Lora(...)}}}}
    variables = {"params": base, "peft": added}
    trainable, frozen = tree.partition(variables, peft.mask(method, variables))

Below the contract stand the small functions that the methods' own files are written with.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError, did_you_mean
from research.nn.on import On
from research.nn.param import is_quantised
from research.nn.sites import Node, Site
from research.peft import tree

PyTree = Any
Sites = dict[str, Site]
Variables = dict[str, PyTree]


class Method(NamedTuple):
    """A transform of the parameter tree.

    Only `init` is required; None stands for the default that its comment names.
    """

    init: Callable[[jax.Array, Sites], PyTree]  # (rng, sites) -> added subtree, leaves boxed with logical axes
    trainable: Callable[[Variables], PyTree] | None = None  # -> mask; default: the nodes' trained fields
    fit: Callable[..., Variables] | None = None  # (rng, variables, loss, batches) -> variables; default: as they are
    realise: Callable[[Variables, Sites], Variables] | None = None  # before apply; default: as they are
    penalty: Callable[[Variables, jax.Array], jax.Array] | None = None  # -> scalar added to the loss; default: 0
    update: Callable[[PyTree, PyTree, jax.Array], PyTree] | None = None  # (added, grads, step) -> added
    rates: Callable[[Variables], PyTree] | None = None  # -> learning-rate factor of each leaf; default: 1
    task: Callable[[Callable], Callable] | None = None  # loss -> loss, where a method changes it; default: as it is
    identity: bool = True  # whether a fresh one leaves the base's function as it is, to the bit


class Card(NamedTuple):
    """What the table of methods says of one: every method's file has a `CARD`.

    memory and inference are what the survey "Scaling Down to Scale Up" (arXiv 2303.15647, tables 1 and 2) says: whether
    training takes less memory, and what a trained model costs more than its base. "-" where it is silent.
    small: options that fit a model of width 32, where the defaults do not: for tests and the smoke table.
    random: whether a training step draws random numbers.
    """

    paper: str  # arXiv number
    kind: str  # additive, selective, reparametrisation or hybrid
    memory: str = "-"
    inference: str = "-"
    small: str = ""
    random: bool = False


def sites(model: nn.Module) -> Sites:
    """Every place of the model where a node may sit, from shapes alone.

    The model is initialised on tokens [1, 2], or on what its `example()` gives.
    """
    return _abstract(model)[1]


def base(model: nn.Module) -> tuple[PyTree, PyTree]:
    """The base's abstract parameters and their logical axes, from shapes alone."""
    boxed = _abstract(model)[0]
    return shapes(boxed), axes(boxed)


def shapes(boxed: PyTree) -> PyTree:
    """The leaves without their boxes. Under a mesh `nn.unbox` would constrain them, which a mere shape can't be."""
    box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if box(x) else x, boxed, is_leaf=box)


def _abstract(model: nn.Module) -> tuple[PyTree, Sites]:
    inputs = model.example() if hasattr(model, "example") else (jnp.zeros((1, 2), jnp.int32),)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    found = tree.paths(variables["sites"], is_leaf=lambda x: isinstance(x, Site))
    return variables["params"], {path.removesuffix("/site"): site for path, site in found.items()}


def axes(boxed: PyTree) -> PyTree:
    """The logical axis names of each boxed leaf; an unboxed leaf has none."""
    box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: tuple(x.names) if box(x) else (), boxed, is_leaf=box)


def init(method: Method, rng: jax.Array, sites: Sites) -> PyTree:
    """The method's added subtree. ValueError where a node sits at no site of its kind: that is the method's bug."""
    added = nn.unbox(method.init(rng, sites))
    for path, node in tree.paths(added, is_leaf=is_node).items():
        where = path.rpartition("/")[0]
        if not is_node(node) or (node.kind != REPARAM and (where not in sites or sites[where].kind != node.kind)):
            raise ValueError(f"{path}: {type(node).__name__} is not a node at a site of its kind")
    return added


def realised(method: Method, variables: Variables, sites: Sites) -> Variables:
    """The variables that the model is applied with."""
    return variables if method.realise is None else method.realise(variables, sites)


def init_axes(method: Method, sites: Sites) -> PyTree:
    """The logical axes of the added subtree."""
    return axes(jax.eval_shape(lambda: method.init(jax.random.key(0), sites)))


def parameters(variables: Variables) -> int:
    """How many parameters base and added subtree have; heads are counted apart.

    A frozen scalar of a node, a layer's or the model's, is a setting and no parameter (LoRA's scale), and so are whole
    numbers and masks. A node that is there in some layers only counts in those.
    """

    def own(path: str, node: Node) -> int:
        name = tree.stack_name(path)
        stack = int(name == "layers")
        if isinstance(node, On):
            whole, depth = own(path, node.node), node.on.shape[0] if stack else 1
            here = len(node.layers) if stack else int(name.removeprefix("layers_")) in node.layers
            return whole // depth * here
        names = [name for name in fields(node) if name not in node.inert]
        leaves = [(name, x) for name in names for x in jax.tree.leaves(getattr(node, name))]
        kept = [x for name, x in leaves if name in node.trained or x.ndim > stack]
        return tree.count([x for x in kept if jnp.issubdtype(x.dtype, jnp.floating)])

    added = tree.paths(variables.get("peft", {}), is_leaf=is_node)
    return tree.count(variables["params"]) + sum(own(path, node) for path, node in added.items())


def mask(method: Method, variables: Variables) -> PyTree:
    """What trains: the method's choice and every task head. FlagError where that is nothing at all."""
    chosen = (method.trainable or trained_fields)(variables)
    if "head" in variables:
        chosen = chosen | {"head": tree.constant(variables["head"], True)}
    if not any(tree.trains(leaf) for leaf in jax.tree.leaves(chosen)):
        raise FlagError("the method trains nothing of this model but a task's head. Valid: lora, or another that adds.")
    return chosen


# ------------------------------------------------------------------------------------------- for the methods' own files

REPARAM = "reparam"  # key and kind of nodes that no site reads: `realise` turns them into nodes that sites do


def is_node(x: Any) -> bool:
    return isinstance(x, Node)


def fields(node: Node) -> list[str]:
    """The names of a node's arrays."""
    return [f.name for f in dataclasses.fields(node) if f.metadata.get("pytree_node", True)]


def frozen(variables: Variables) -> PyTree:
    """The mask in which nothing trains."""
    return tree.constant(variables, False)


def trained_fields(variables: Variables) -> PyTree:
    """The default mask: the fields that each node names as trained."""

    def of(node: Any) -> Any:
        if not is_node(node):
            return False
        return node.replace(**{name: tree.constant(getattr(node, name), name in node.trained) for name in fields(node)})

    return frozen(variables) | {"peft": jax.tree.map(of, variables.get("peft", {}), is_leaf=is_node)}


def base_leaves(pattern: str, variables: Variables) -> PyTree:
    """The mask in which the base's leaves train whose path ends with `pattern`."""
    matches = matcher(pattern)

    def chosen(path: str, leaf: Any) -> Any:
        if is_quantised(leaf) and matches(path):
            raise FlagError(
                f"{path} is quantised and can't train: load the base unquantised, or add parameters instead."
            )
        return tree.constant(leaf, False) if is_quantised(leaf) else matches(path)

    return frozen(variables) | {"params": tree.map_with_path(chosen, variables["params"], is_leaf=is_quantised)}


def either(*masks: PyTree) -> PyTree:
    """OR of masks."""

    def of(*leaves: Any) -> Any:
        some = [m for m in leaves if m is not False]
        if not some or any(m is True for m in some):
            return bool(some)
        abstract = [m for m in some if isinstance(m, jax.ShapeDtypeStruct)]
        return abstract[0] if abstract else functools.reduce(np.logical_or, some)

    return jax.tree.map(of, *masks)


def matcher(pattern: str) -> Callable[[str], bool]:
    """A regular expression for the end of a path, from a whole name on: "q" matches "layers/attn/q" but not "eq"."""
    try:
        compiled = re.compile(rf"(?:.*/)?(?:{pattern})")
    except re.error as error:
        raise FlagError(f"{pattern!r} is not a regular expression: {error}.") from None
    return lambda path: compiled.fullmatch(path) is not None


def select(sites: Sites, kind: str, pattern: str, option: str = "targets") -> Sites:
    """The sites of a kind whose path matches; "all" is every one inside the layers. FlagError where that is none."""
    of_kind = {path: site for path, site in sites.items() if site.kind == kind}
    matches = matcher(r"layers(_\d+)?/.*" if pattern == "all" else pattern)
    chosen = {path: site for path, site in of_kind.items() if matches(path)}
    for path, site in sites.items():
        if site.kind == "tied" and kind == "linear" and matches(path):
            raise FlagError(
                f"{option}={pattern}: {path} is this model's token table, so a change of one would be a change of the "
                "other: untie them first (--untie), or leave it out, as targets=all does."
            )
    if not chosen:
        names = {re.sub(r"^layers(_\d+)?/", "", path) for path in of_kind}
        raise FlagError(f"{option}={pattern} matches no {kind} site of this model.{did_you_mean(pattern, names)}")
    return chosen


def place(sites: Sites, name: str, rng: jax.Array, make: Callable[[Site, jax.Array], Node]) -> PyTree:
    """Puts `make(site, rng)` at each site under key `name`; the rng depends on the path, not on the other sites."""
    return tree.unflatten({f"{path}/{name}": make(site, fold(rng, path)) for path, site in sites.items()})


def fold(rng: jax.Array, name: str) -> jax.Array:
    """A key for a name."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def leaf(site: Site, rng: jax.Array, draw: Callable, shape: tuple[int, ...], names: Iterable[str | None] = ()) -> Any:
    """`draw(rng, shape)` with the site's stack in front, boxed with logical axes (default: none sharded)."""
    stack = tuple(site.stack.shape)
    names = tuple(names) or (None,) * len(shape)
    return nn.LogicallyPartitioned(draw(rng, (*stack, *shape)), ("layers",) * len(stack) + names)


def constant(value: float) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """Draws `value` everywhere."""
    return lambda rng, shape: jnp.full(shape, value, jnp.float32)


def zeros(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws zeros."""
    return jnp.zeros(shape, jnp.float32)


def normal(std: float) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """Draws N(0, std^2)."""
    return lambda rng, shape: std * jax.random.normal(rng, shape, jnp.float32)


def uniform(limit: float) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """Draws U(-limit, limit)."""
    return lambda rng, shape: jax.random.uniform(rng, shape, jnp.float32, -limit, limit)


def at_least(name: str, value: float, least: float) -> None:
    """FlagError where an option is below its least value."""
    if not value >= least:
        raise FlagError(f"{name}={value} is out of range: the least value is {least}.")


def divides(name: str, value: int, width: int) -> None:
    """FlagError where an option does not divide a width; it names the nearest that do."""
    at_least(name, value, 1)
    if width % value:
        near = sorted((k for k in range(1, width + 1) if width % k == 0), key=lambda k: abs(k - value))[:3]
        raise FlagError(f"{name}={value} does not divide {width}. Valid: {', '.join(map(str, sorted(near)))}.")


def split_outside(text: str, separator: str) -> list[str]:
    """Splits at a regular expression, but never inside brackets: targets are regular expressions themselves."""
    depth, inside = 0, set()
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth:
            inside.add(i)
    cuts = [m.start() for m in re.finditer(separator, text) if m.start() not in inside]
    return [text[a:b] for a, b in zip([0, *(c + 1 for c in cuts)], [*cuts, len(text)], strict=True)]
