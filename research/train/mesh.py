"""Meshes and shardings: modules name logical axes, one table maps them to mesh axes.

    mesh = make_mesh("data:2,fsdp:4")
    with use(mesh):                                          # so that the models' constraints see it
        frozen = shard(frozen, shardings(axes, frozen, mesh))

All four mesh axes always exist, those not named with size 1, so the table holds on every mesh.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.errors import FlagError, did_you_mean
from research.peft import tree

PyTree = Any
AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis -> mesh axes. Within one array the first dimension that asks for a mesh axis gets it.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("rank", None),
    ("norm", None),
    ("position", None),
)


def make_mesh(spec: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of "data:2,fsdp:4"; "" is one axis over all devices.

    FlagError for an unknown axis or a product that isn't the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes: dict[str, int] = {}
    for part in filter(None, (spec or f"data:{len(devices)}").replace("=", ":").split(",")):
        name, _, size = part.strip().partition(":")
        if name not in AXES:
            raise FlagError(f"mesh {spec!r}: unknown axis {name!r}.{did_you_mean(name, AXES)}")
        if name in sizes:
            raise FlagError(f"mesh {spec!r}: axis {name!r} is given twice")
        if not size.isdecimal() or int(size) < 1:
            raise FlagError(f"mesh {spec!r}: axis {name!r} needs a size, as in {name}:2")
        sizes[name] = int(size)
    if math.prod(sizes.values()) != len(devices):
        fits = _factorisations(list(sizes) or ["data"], len(devices))
        places = math.prod(sizes.values())
        raise FlagError(f"mesh {spec!r} has {places} places for {len(devices)} devices. Valid: {', '.join(fits)}.")
    shape = tuple(sizes.get(name, 1) for name in AXES)
    # Auto: linen's constraints raise under make_mesh's default, Explicit.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Makes the mesh and RULES those of the models' sharding constraints. (`with mesh:` makes them silent no-ops.)"""
    import flax.linen as nn

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Maps logical axes of an array to a PartitionSpec; a dimension that its mesh axes don't divide is replicated."""
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {tuple(axes)} for an array of shape {tuple(shape)}")
    table, used, out = dict(RULES), set(), []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in table:
            raise ValueError(f"unknown logical axis {axis!r}.{did_you_mean(axis, table)}")
        names = table.get(axis) or ()
        names = tuple(n for n in ((names,) if isinstance(names, str) else names) if mesh.shape[n] > 1 and n not in used)
        if not names or size % math.prod(mesh.shape[n] for n in names):
            out.append(None)
            continue
        used.update(names)
        out.append(names[0] if len(names) == 1 else names)
    return PartitionSpec(*out)


def shardings(axes_tree: PyTree, abstract_tree: PyTree, mesh: Mesh) -> PyTree:
    """NamedShardings with the structure of `abstract_tree` (arrays or shapes; holes stay holes).

    `axes_tree` holds at each leaf's place a tuple of logical axes, or None for a replicated leaf; where the abstract
    tree has a hole anything goes.
    """

    def one(leaf: Any, axes: Any) -> NamedSharding | None:
        if leaf is None:
            return None
        return NamedSharding(mesh, PartitionSpec() if axes is None else partition_spec(tuple(axes), leaf.shape, mesh))

    return jax.tree.map(one, abstract_tree, axes_tree, is_leaf=lambda x: x is None)


def state_shardings(axes_tree: PyTree, abstract_state: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a TrainState.

    An optimiser leaf with the path and shape of a trainable leaf has its sharding, any other is replicated.
    """
    trainable = shardings(axes_tree, abstract_state.trainable, mesh)
    shapes, places = tree.paths(abstract_state.trainable), tree.paths(trainable)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if name in shapes and shapes[name].shape == leaf.shape:
                return places[name]
        return everywhere

    return abstract_state.replace(
        step=everywhere,
        trainable=trainable,
        extra=None if abstract_state.extra is None else shardings(axes_tree, abstract_state.extra, mesh),
        mask=None if abstract_state.mask is None else shardings(axes_tree, abstract_state.mask, mesh),
        opt_state=tree.map_with_path(one, abstract_state.opt_state),
        rng=everywhere,
    )


def batch_sharding(mesh: Mesh, micro: bool = True) -> NamedSharding:
    """Rows over `data` and `fsdp`: for leaves [M, B, ...], or [B, ...] without micro-batches.

    As `in_shardings` it fits leaves of any rank.
    """
    rows = ("data", "fsdp")
    return NamedSharding(mesh, PartitionSpec(None, rows) if micro else PartitionSpec(rows))


def shard(values: PyTree, places: PyTree) -> PyTree:
    """Puts a tree (or numpy arrays) in its places.

    Always copies: `device_put` may alias its source, which donating the result would then delete.
    """
    return jax.tree.map(lambda x, place: jax.device_put(jnp.copy(x), place), values, places)


def place_batch(rows: PyTree, place: NamedSharding) -> PyTree:
    """One global batch: numpy leaves [M, B, ...] (or [B, ...]), which every process has made, become arrays in `place`,
    a `batch_sharding`. Each device gets its own rows, and none crosses the network.

    Raises FlagError where the rows can't be shared out over the mesh.
    """
    axis = 0 if place.spec and place.spec[0] else 1
    ways = math.prod(place.mesh.shape[name] for name in place.spec[axis])
    count = jax.tree.leaves(rows)[0].shape[axis]
    if count % ways:
        near = max(1, round(count / ways)) * ways
        raise FlagError(f"a batch of {count} rows is not divided by the mesh's data x fsdp = {ways}. Valid: {near}.")
    put = lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index])  # noqa: E731
    return jax.tree.map(lambda x: put(np.asarray(x)), rows)


def load(read: PyTree, places: PyTree) -> PyTree:
    """Puts leaves straight into their shards: each process reads only the slices that its own devices hold.

    `read`: a tree whose leaves can be sliced and have `shape` and `dtype`: numpy arrays (memory-mapped ones too),
    readers of a file's tensors, or arrays that every process has whole. Holes stay holes, and what is in its place
    already is returned as it is.
    """

    def one(leaf: Any, place: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf), place), impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and leaf.sharding == place:
            return leaf  # loaded there already
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=place)(leaf)  # spread over the processes in another way
        cut = lambda index: np.asarray(leaf[index], leaf.dtype)  # noqa: E731
        return jax.make_array_from_callback(tuple(leaf.shape), place, cut)

    return jax.tree.map(one, read, places)


def init(make: Callable[..., PyTree], places: PyTree, *args: Any) -> PyTree:
    """`make(*args)` computed where its results live: no device ever holds a whole leaf."""
    return jax.jit(make, out_shardings=places)(*args)


def _factorisations(names: list[str], count: int, most: int = 6) -> list[str]:
    """Meshes over these axes, and if that's a single one over data and fsdp too, whose product is `count`."""
    names = names if len(names) > 1 else [*names, *(n for n in AXES if n not in names)][:2]
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    sizes = [s for s in itertools.product(divisors, repeat=len(names)) if math.prod(s) == count]
    return [",".join(f"{n}:{k}" for n, k in zip(names, s, strict=True)) for s in sizes[:most]]
