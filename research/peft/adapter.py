"""Adapter directories: everything a run added to its base, and nothing else.

    DIR/adapter.safetensors   "peft/layers/attn/q/lora/a", "head/kernel", "params/..." for base leaves that trained
    DIR/adapter.json          format, method specification, base (name, fingerprint), sha256 of the weights, counts, ...

No adapter name enters a key, so any name of the directory will do. A prefix MLP is dropped: what is saved is what it
realises. A frozen leaf that the specification alone rebuilds (a scale, a random projection of a given seed) is not
stored, and of a leaf that trains in part only that part is. Loading is strict: a missing, unexpected or mis-shaped
leaf, one whose numbers would be rounded, altered bytes, and another base are errors.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import ModelError, UserError
from research.files import os_error, replace_directory
from research.nn.on import On
from research.peft import method as peft
from research.peft import partial, registry, tree
from research.peft.method import Method, PyTree, Sites, Variables

FORMAT = 1
WEIGHTS, META = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: the method, its metadata, and its leaves by path (host arrays)."""

    method: Method
    meta: dict[str, Any]
    leaves: dict[str, np.ndarray]


def save(
    directory: str | Path, spec: str, variables: Variables, sites: Sites, base: dict[str, str], **meta: Any
) -> int:
    """Writes an adapter directory atomically and returns its bytes. `base`: {"name", "fingerprint"}; `meta`: further
    JSON values. All processes of a run call it: leaves that are spread over them are gathered, and one writes.

    Raises ModelError where the directory can't be written; what was there before stays.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    directory, method = Path(directory), registry.parse(spec)
    mask = peft.mask(method, variables)
    leaves = stored(method, variables, sites, mask)
    record = {"format": FORMAT, "spec": spec, "base": base, "trainable": tree.count(variables, mask), **meta}

    def fill(folder: Path) -> None:
        try:
            save_file(leaves, folder / WEIGHTS)
        except SafetensorError as error:
            raise os_error(error, "weights not saved") from error
        sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        text = json.dumps(record | {"sha256": sha256}, indent=1, ensure_ascii=False)
        (folder / META).write_text(text + "\n", encoding="utf-8")

    needed = sum(x.nbytes for x in leaves.values())
    return replace_directory(directory, fill, ours=lambda d: (d / META).exists(), needed=needed)


def stored(method: Method, variables: Variables, sites: Sites, mask: PyTree) -> dict[str, np.ndarray]:
    """What the weights file holds, by path."""
    trained, _ = tree.partition(variables["params"], mask["params"])
    realised = peft.realised(method, variables, sites)
    kept = {k: v for k, v in realised.items() if k == "head"} | {"params": trained}
    leaves = {path: tree.whole(x) for path, x in tree.paths(kept | {"peft": own(realised["peft"])}).items()}
    for path, x in _rebuilt(method, sites, mask).items():
        if path in leaves and np.asarray(x).tobytes() == leaves[path].tobytes():
            del leaves[path]
    out, on = {}, _on_paths(variables["peft"])
    masks = tree.paths(mask)
    for path, leaf in leaves.items():
        partly = np.ndim(masks.get(path, True)) > 0 and (path.startswith("params/") or path in on)
        out |= partial.pack(path, leaf, tree.whole(masks[path])) if partly else {path: leaf}
    return out


def own(added: PyTree) -> PyTree:
    """Without the nodes that `realise` makes at every apply."""
    if not isinstance(added, dict):
        return added
    return {k: own(v) for k, v in added.items() if not (peft.is_node(v) and v.derived)}


def _on_paths(added: PyTree) -> set[str]:
    """The leaves of nodes that are there in some layers only: elsewhere their numbers mean nothing."""
    nodes = tree.paths(added, is_leaf=peft.is_node)
    return {f"peft/{path}/{p}" for path, node in nodes.items() if isinstance(node, On) for p in tree.paths(node)}


def _rebuilt(method: Method, sites: Sites, mask: PyTree) -> dict[str, jax.Array]:
    """The leaves that do not train, as a fresh one has them; `mask` may be that of a realised tree."""
    masks = tree.paths(mask["peft"])

    def fresh() -> dict[str, jax.Array]:
        added = tree.paths(peft.init(method, jax.random.key(0), sites))
        return {f"peft/{path}": x for path, x in added.items() if not tree.trains(masks.get(path, True))}

    return jax.jit(fresh)() if jax.eval_shape(fresh) else {}


def load(directory: str | Path) -> Adapter:
    """Reads an adapter directory. Raises ModelError where a file is missing, truncated or altered."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    directory = Path(directory)
    if not (directory / META).is_file():
        found = (
            ", ".join(sorted(p.name for p in directory.iterdir())[:5]) if directory.is_dir() else "no such directory"
        )
        raise ModelError(f"{directory} is no adapter: it has no {META} ({found or 'it is empty'}).")
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        sha256 = hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest()
        leaves = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"adapter {directory} is damaged: {str(error).splitlines()[0]}.") from None
    except (AttributeError, KeyError, TypeError) as error:  # a dtype of the format that numpy has not, such as float8
        raise ModelError(
            f"adapter {directory} is damaged: {WEIGHTS} has a leaf of an unknown type ({error})."
        ) from None
    if not isinstance(meta, dict):
        raise ModelError(f"adapter {directory} is damaged: {META} does not describe an adapter.")
    if meta.get("format") != FORMAT:
        raise ModelError(f"adapter {directory} has format {meta.get('format')!r}; this version reads {FORMAT}.")
    if key := _bad_key(meta):
        raise ModelError(f"adapter {directory} is damaged: {META} has no valid {key!r}.")
    if sha256 != meta["sha256"]:
        raise ModelError(f"adapter {directory} is damaged: {WEIGHTS} is not the file that {META} describes.")
    try:
        method = registry.parse(meta["spec"])
    except UserError as error:
        raise ModelError(f"adapter {directory}: its method can't be rebuilt: {error}") from None
    return Adapter(method, meta, leaves)


def _bad_key(meta: dict[str, Any]) -> str | None:
    """The first key of adapter.json that is missing or of the wrong type."""
    base = meta["base"] if isinstance(meta.get("base"), dict) else {}
    texts = {"spec": meta.get("spec"), "base.name": base.get("name"), "base.fingerprint": base.get("fingerprint")}
    texts["sha256"] = meta.get("sha256")
    right = {key: isinstance(value, str) for key, value in texts.items()}
    if meta.get("task") == "classify":
        classes, length = meta.get("classes"), meta.get("max_length")
        right["classes"] = isinstance(classes, list) and classes != [] and all(isinstance(c, str) for c in classes)
        right["max_length"] = type(length) is int and length > 0  # a bool is an int too
    return next((key for key, fine in right.items() if not fine), None)


def attach(
    adapter: Adapter,
    params: PyTree,
    sites: Sites,
    fingerprint: str,
    force: bool = False,
    head: PyTree | None = None,
) -> Variables:
    """The variables of base + adapter. `head`: shapes of the task head that must be there; None takes what is there.

    Nothing is allocated but what the file holds. Raises ModelError for another base (unless `force`) and for leaves
    that do not fit.
    """
    base = adapter.meta["base"]
    if base["fingerprint"] != fingerprint and not force:
        raise ModelError(
            f"the adapter was trained on base {base['name']} ({base['fingerprint'][:12]}), "
            f"not on this one ({fingerprint[:12]}): load that base."
        )
    method = adapter.method
    added = jax.eval_shape(lambda: peft.init(method, jax.random.key(0), sites))
    mask = _held(adapter, peft.mask(method, {"params": params, "peft": added, "head": {"bias": jnp.zeros(1)}}))
    trained, rest = tree.partition(params, mask["params"])
    saved = jax.eval_shape(lambda x: own(peft.realised(method, {"params": params, "peft": x}, sites)["peft"]), added)
    if head is None:
        head = tree.unflatten({p: x for p, x in adapter.leaves.items() if p.startswith("head/")}).get("head")
    expected = {"peft": saved, "params": trained} | ({} if head is None else {"head": head})
    filled = _fill(expected, _whole(adapter, expected, trained, sites, mask))
    return filled | {"params": tree.combine(filled["params"], rest)}


def _held(adapter: Adapter, mask: PyTree) -> PyTree:
    """The mask in which a base leaf of which data chose the elements trains where the file has some of them."""
    there = {path.partition("#")[0] for path in adapter.leaves}
    absent = lambda path, m: isinstance(m, jax.ShapeDtypeStruct) and f"params/{path}" not in there  # noqa: E731
    return mask | {"params": tree.map_with_path(lambda path, m: m if not absent(path, m) else False, mask["params"])}


def _whole(adapter: Adapter, expected: PyTree, trained: PyTree, sites: Sites, mask: PyTree) -> dict[str, Any]:
    """The adapter's leaves, with those put together that are stored in part or rebuilt."""
    parts = {path.removesuffix("#mask") for path in adapter.leaves if path.endswith("#mask")}
    leaves = {path: x for path, x in adapter.leaves.items() if not path.endswith(partial.PARTS)}
    base = {f"params/{path}": x for path, x in tree.paths(trained).items()}
    wanted = set(tree.paths(expected))
    fresh = {}
    if any(path.startswith("peft/") for path in parts):
        fresh = jax.jit(lambda: peft.init(adapter.method, jax.random.key(0), sites))()
        fresh = {f"peft/{path}": x for path, x in tree.paths(fresh).items()}
    for path in parts:
        if path not in base and path not in fresh:
            raise ModelError(f"the adapter does not fit this model: 1 unexpected: {path}.")
        try:
            packed = [adapter.leaves[path + part] for part in partial.PARTS]
            leaves[path] = partial.unpack(np.asarray(base.get(path, fresh.get(path))), *packed)
        except (KeyError, ValueError) as error:
            raise ModelError(f"the adapter does not fit this model: {path}: {error}.") from None
    if wanted - set(leaves):
        rebuilt = _rebuilt(adapter.method, sites, mask)
        leaves |= {path: x for path, x in rebuilt.items() if path in wanted and path not in leaves}
    return leaves


def _fill(expected: PyTree, leaves: dict[str, Any]) -> PyTree:
    """Puts leaves into the expected structure, strictly."""
    wanted = tree.paths(expected)
    missing, unexpected = sorted(set(wanted) - set(leaves)), sorted(set(leaves) - set(wanted))
    if missing or unexpected:
        kinds = ("missing", missing), ("unexpected", unexpected)
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in kinds if names)
        raise ModelError(f"the adapter does not fit this model: {told}.")
    for path, leaf in wanted.items():
        found = leaves[path]
        if leaf.shape != found.shape:
            raise ModelError(f"the adapter does not fit this model: {path} is {found.shape}, expected {leaf.shape}.")
        if not _holds(leaf.dtype, found.dtype):
            raise ModelError(f"the adapter does not fit this model: {path} is {found.dtype}, expected {leaf.dtype}.")
    return tree.map_with_path(lambda path, leaf: jnp.asarray(leaves[path], leaf.dtype), expected)


def _holds(wide: Any, narrow: Any) -> bool:
    """Whether a type holds every value of another of its kind."""
    kinds = {jnp.issubdtype(dtype, jnp.floating) for dtype in (wide, narrow)}
    return len(kinds) == 1 and jnp.promote_types(wide, narrow) == wide
