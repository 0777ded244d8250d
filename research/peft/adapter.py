"""Adapter directories: everything a run added to its base, and nothing else.

    DIR/adapter.safetensors   "peft/layers/attn/q/lora/a", "head/kernel", "params/..." for base leaves that trained
    DIR/adapter.json          format, method specification, base (name, fingerprint), head classes, counts

No adapter name enters a key, so any name of the directory will do. A prefix MLP is dropped: what is saved is what it
realises. Loading rebuilds the structure from the specification and is strict: a missing, unexpected or mis-shaped leaf
is an error, and so is another base.
"""

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import ModelError, UserError
from research.files import replace_directory
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.method import ENCODER, Method, PyTree, Sites, Variables

FORMAT = 1
WEIGHTS, META = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: the method, its metadata, and its leaves by path (host arrays)."""

    method: Method
    meta: dict[str, Any]
    leaves: dict[str, np.ndarray]


def realised(method: Method, variables: Variables, sites: Sites) -> Variables:
    """The variables that the model is applied with."""
    return variables if method.realise is None else method.realise(variables, sites)


def save(
    directory: str | Path, spec: str, variables: Variables, sites: Sites, base: dict[str, str], **meta: Any
) -> int:
    """Writes an adapter directory atomically and returns its bytes. `base`: {"name", "fingerprint"}; `meta`: further
    JSON values.

    Raises ModelError where the directory can't be written; what was there before stays.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    directory, method = Path(directory), registry.parse(spec)
    mask = peft.mask(method, variables)
    trained_base, _ = tree.partition(variables["params"], mask["params"])
    kept = {k: v for k, v in realised(method, variables, sites).items() if k in ("peft", "head")} | {
        "params": trained_base
    }
    leaves = {path: np.asarray(x) for path, x in tree.paths(kept).items()}
    record = {"format": FORMAT, "spec": spec, "base": base, "trainable": tree.count(variables, mask), **meta}

    def fill(folder: Path) -> None:
        try:
            save_file(leaves, folder / WEIGHTS)
        except SafetensorError as error:  # its own name for a failed write
            full = f"os error {errno.ENOSPC}" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
        (folder / META).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    replace_directory(
        directory, fill, ours=lambda d: (d / META).exists(), needed=sum(x.nbytes for x in leaves.values())
    )
    return sum(f.stat().st_size for f in directory.iterdir())


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
        leaves = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"adapter {directory} is damaged: {str(error).splitlines()[0]}.") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("base", {}), dict):
        raise ModelError(f"adapter {directory} is damaged: {META} does not describe an adapter.")
    if meta.get("format") != FORMAT:
        raise ModelError(f"adapter {directory} has format {meta.get('format')!r}; this version reads {FORMAT}.")
    try:
        method = registry.parse(str(meta["spec"]))
    except (KeyError, UserError) as error:
        raise ModelError(f"adapter {directory}: its method can't be rebuilt: {error}") from None
    return Adapter(method, meta, leaves)


def attach(adapter: Adapter, params: PyTree, sites: Sites, fingerprint: str, force: bool = False) -> Variables:
    """The variables of base + adapter.

    Raises ModelError for another base (unless `force`) and for leaves that do not fit.
    """
    base = adapter.meta.get("base", {})
    if base.get("fingerprint") != fingerprint and not force:
        raise ModelError(
            f"the adapter was trained on base {base.get('name')} ({str(base.get('fingerprint'))[:12]}), "
            f"not on this one ({fingerprint[:12]}): load that base."
        )
    variables: Variables = {"params": params, "peft": peft.init(adapter.method, jax.random.key(0), sites)}
    mask = peft.mask(adapter.method, variables | {"head": {"bias": jnp.zeros(1)}})
    trained, rest = tree.partition(params, mask["params"])
    heads = tree.unflatten({p: jnp.asarray(x) for p, x in adapter.leaves.items() if p.startswith("head/")})
    expected = (
        {k: v for k, v in realised(adapter.method, variables, sites).items() if k == "peft"}
        | {"params": trained}
        | heads
    )
    expected.get("peft", {}).pop(ENCODER, None)
    filled = _fill(expected, adapter.leaves)
    return filled | {"params": tree.combine(filled["params"], rest)}


def _fill(expected: PyTree, leaves: dict[str, np.ndarray]) -> PyTree:
    """Puts leaves into the expected structure, strictly."""
    wanted = tree.paths(expected)
    missing, unexpected = sorted(set(wanted) - set(leaves)), sorted(set(leaves) - set(wanted))
    if missing or unexpected:
        kinds = ("missing", missing), ("unexpected", unexpected)
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in kinds if names)
        raise ModelError(f"the adapter does not fit this model: {told}.")
    for path, leaf in wanted.items():
        if leaf.shape != leaves[path].shape:
            raise ModelError(
                f"the adapter does not fit this model: {path} is {leaves[path].shape}, expected {leaf.shape}."
            )
    return tree.map_with_path(lambda path, leaf: jnp.asarray(leaves[path], leaf.dtype), expected)
