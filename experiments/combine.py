"""Writes the weighted sum of adapters of one method as an adapter directory, which loads like any other.

    python -m experiments.combine --adapters=runs/a/adapter,runs/b/adapter --weights=0.5,0.5 --output=runs/both
    python -m experiments.combine --adapters=DIR1,DIR2 --weights=1,-1 --how=svd --rank=8 --output=DIR
    python -m experiments.combine --adapters=DIR1,DIR2 --weights=1,1 --how=ties --density=0.2 --rank=16 --output=DIR

What each --how does is told in `research.peft.arithmetic`; "linear" is the exact sum. What changes kernels comes out as
a LoRA, so that the specification that is written may be of another rank, or another method, than those that are read.
The directory is read back before it takes its place.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.shared import common
from research.convert.load import Pretrained, load
from research.errors import FlagError, ModelError
from research.nn.on import On
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.adapter import Adapter
from research.peft.arithmetic import combine
from research.peft.elements import Elements
from research.peft.houlsby import Bottleneck
from research.peft.method import Method, PyTree, Sites, Variables
from research.peft.parallel import Parallel
from research.peft.rows import same
from research.peft.sum_rules import HOWS, MAJORITIES

RECORDED = ("format", "spec", "base", "trainable", "sha256")  # what adapter.save itself writes


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_list("adapters", None, "Adapter directories, of one base.", required=True)
    flags.DEFINE_list("weights", None, "A number for each; a negative one subtracts.", required=True)
    flags.DEFINE_string("output", None, "Directory to write; it must not exist, or hold an adapter.", required=True)
    flags.DEFINE_string("how", "linear", f"One of {', '.join(HOWS)}.")
    flags.DEFINE_integer("rank", None, "Largest rank of a kernel's change; not for linear and cat.")
    flags.DEFINE_float("density", None, "Share of a change that pruning keeps.")
    flags.DEFINE_string("majority", None, f"What elects signs: {' or '.join(MAJORITIES)}.")
    flags.DEFINE_integer("seed", None, "Of the random numbers of dare_linear and dare_ties.")
    flags.DEFINE_integer("head", None, "Number, from 0, of the adapter whose task head is kept.")
    flags.DEFINE_string("model", None, "The base, where it is not the one that the first adapter names.")
    flags.DEFINE_bool("force", False, "Combine although an adapter was trained on another base.")


def main() -> None:
    values = flags.FLAGS
    found = [adapters.load(directory) for directory in values.adapters]
    if not found:
        raise FlagError("--adapters is empty: name adapter directories, separated by commas.")
    base = load(values.model or found[0].meta["base"]["name"])
    sites = peft.sites(base.model)
    each = [attached(one, base, sites, values.force) for one in found]
    options = common.flag_values("how", "rank", "density", "majority", "seed", "head")
    numbers = weights(values.weights)
    total = combine(each, numbers, base=base.params, **options)
    spec = specification([one.meta["spec"] for one in found], total)
    record = {"adapters": values.adapters, "weights": numbers, **options}
    size = save(values.output, spec, total, base, sites, meta(found, values.head) | {"combined": record})
    print(f"written: {values.output} ({spec}, {size} bytes)")


def weights(texts: Sequence[str]) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise FlagError(f"--weights={','.join(texts)} are not all numbers, such as 0.5,0.5.") from None


def attached(adapter: Adapter, base: Pretrained, sites: Sites, force: bool) -> Variables:
    """The adapter's realised variables."""
    variables = adapters.attach(adapter, base.params, sites, base.fingerprint, force)
    return peft.realised(adapter.method, variables, sites)


def meta(found: Sequence[Adapter], head: int | None) -> dict[str, Any]:
    """What goes with the head that is kept: task, classes, and so on."""
    with_head = [one for one in found if any(path.startswith("head/") for path in one.leaves)]
    kept = found[head] if head is not None else (with_head or found)[0]
    return {key: value for key, value in kept.meta.items() if key not in RECORDED}


def save(directory: str, spec: str, total: Variables, base: Pretrained, sites: Sites, more: dict[str, Any]) -> int:
    """Writes the sum, if what is read back is the sum. Returns its bytes.

    Raises ModelError where the specification can't hold it: nothing is written then.
    """
    method, identity = registry.parse(spec), {"name": base.name, "fingerprint": base.fingerprint}

    def fresh() -> PyTree:
        added = peft.init(method, jax.random.key(0), sites)
        return peft.realised(method, {"params": base.params, "peft": added}, sites)["peft"]

    shapes, found = ({p: x.shape for p, x in tree.paths(t).items()} for t in (jax.eval_shape(fresh), total["peft"]))
    if odd := [path for path in shapes | found if shapes.get(path) != found.get(path)]:
        raise ModelError(f"the sum is no {spec}, as its parts are: {odd[0]} does not fit. Nothing was written.")
    marked = mark(method, total, base.params, sites)
    with tempfile.TemporaryDirectory() as scratch:
        adapters.save(Path(scratch) / "sum", spec, marked, sites, identity)
        again = adapters.attach(adapters.load(Path(scratch) / "sum"), base.params, sites, base.fingerprint)
    wanted, held = tree.paths(_used(total)), tree.paths(_used(again))
    both = wanted.keys() & held.keys()
    if lost := [path for path in wanted | held if path not in both or not same(wanted[path], held[path])]:
        raise ModelError(f"an adapter of {spec} does not hold the sum: {lost[0]} is lost. Nothing was written.")
    return adapters.save(directory, spec, marked, sites, identity, **more)


def _used(variables: Variables) -> Variables:
    """What an adapter has to hold: of a node that is there in some layers only, those layers."""
    on = lambda node: jax.tree.map(lambda x: x[np.asarray(node.on)], node.node)  # noqa: E731
    used = lambda node: on(node) if isinstance(node, On) else node  # noqa: E731
    added = jax.tree.map(used, variables["peft"], is_leaf=peft.is_node)
    return {k: v for k, v in variables.items() if k != "shared"} | {"peft": added}


def specification(specs: Sequence[str], total: Variables) -> str:
    """The specification of a sum of adapters of these: methods, ranks and widths follow the sum."""
    split = [registry.split(spec) for spec in specs]
    if len({len(parts) for parts in split}) > 1:
        raise ModelError(f"chains of different lengths have no sum: {'; '.join(specs)}.")
    nodes, width = tree.paths(total["peft"], is_leaf=peft.is_node), len(str(len(split[0]) - 1))
    parts = []
    for i, part in enumerate(split[0]):
        number = f"{i:0{width}d}_" if len(split[0]) > 1 else ""
        mine = {path: n for path, n in nodes.items() if path.rpartition("/")[2].startswith(number)}
        parts.append(_text(part.strip(), number, mine))
    return "+".join(parts)


def _text(text: str, number: str, nodes: dict[str, Any]) -> str:
    """One part of a chain, whose nodes these are."""
    names = {path.rpartition("/")[2].removeprefix(number) for path in nodes}
    bare = {path.rpartition("/")[0]: n.node if isinstance(n, On) else n for path, n in nodes.items()}
    if names in ({"lora"}, {"dora"}, {"hira"}):
        return _low_rank_text(names.pop(), bare, [n.layers for n in nodes.values() if isinstance(n, On)])
    inner = [n.adapter if isinstance(n, Parallel) else n for n in bare.values()]
    if names == {text.partition(":")[0]} and all(isinstance(n, Bottleneck) for n in inner):
        old, new = r"(?<=[:,])\s*width\s*=[^,]*", f"width={inner[0].down.shape[-1]}"
        return re.sub(old, new, text) if re.search(old, text) else f"{text}{',' if ':' in text else ':'}{new}"
    return text


def _low_rank_text(name: str, nodes: dict[str, Any], layers: list[tuple[int, ...]]) -> str:
    """The options that give each site its rank and scale."""
    ranks = {path: n.a.shape[-1] for path, n in nodes.items()}
    scales = {path: float(np.ravel(n.scale)[0]) for path, n in nodes.items()}
    alphas = {path: scales[path] * rank for path, rank in ranks.items()}
    text = []
    for option, values in {"rank": ranks, **({"scale": scales} if name == "hira" else {"alpha": alphas})}.items():
        usual = max(values.values(), key=list(values.values()).count)
        other = "|".join(f"{path}:{value:g}" for path, value in values.items() if value != usual)
        text += [f"{option}={usual:g}", *([f"{option}_pattern={other}"] if other else [])]
    targets = sorted({re.sub(r"^layers(_\d+)?/", "", path) for path in nodes})
    text += [f"targets={'|'.join(targets)}", *([f"layers={'|'.join(map(str, layers[0]))}"] if layers else [])]
    return f"{name}:{','.join(text)}"


def mark(method: Method, total: Variables, base: PyTree, sites: Sites) -> Variables:
    """The sum with marks of what trains, which `adapter.save` asks for where a method has chosen that from data (FISH
    Mask, LT-SFT, FAR): all that differs from the base.
    """
    fresh = tree.paths(peft.init(method, jax.random.key(0), sites), is_leaf=peft.is_node)
    marks = {path: node.chosen for path, node in fresh.items() if isinstance(node, Elements)}
    if not marks:
        return total
    moved = jax.tree.map(lambda old, new: np.asarray(old) != np.asarray(new), base, total["params"])
    flat = tree.paths(moved)

    def units(path: str, mark: Any) -> np.ndarray:
        over = tuple(i for i, size in enumerate(mark.shape) if size == 1)
        return flat[path].any(axis=over, keepdims=True)

    found = {path: tree.map_with_path(units, m) if isinstance(m, dict) else moved for path, m in marks.items()}
    nodes = tree.unflatten({path: Elements(m) for path, m in found.items()})
    return total | {"peft": tree.merge_dicts(total["peft"], nodes)}


if __name__ == "__main__":
    define_flags()
    common.run(main)
