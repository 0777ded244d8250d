"""Adapter directories of Hugging Face PEFT, in and out: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight (r, in)  <->  peft/layers/attn/q/lora/a[3] [in, r]

Tensors' names are in `hf_peft_keys.py`, methods in `hf_peft_methods.py`; writing is `hf_peft_write.py`. Reading is
strict: missing, unexpected and mis-shaped tensors are errors. What their configuration says and our specification
cannot is in frozen leaves: ranks that differ by layer are padded with zeros, scales and random places are the file's.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.convert import hf, hf_peft_config
from research.convert import hf_peft_keys as keys
from research.convert.config import Config, Json
from research.convert.hf_peft_config import Rank
from research.convert.hf_peft_keys import CONFIG, SOFT, UNDER, WEIGHTS
from research.convert.hf_peft_methods import TYPES
from research.convert.hf_peft_write import save
from research.convert.names import prefix
from research.errors import FlagError, ModelError, did_you_mean
from research.models.bert import BertConfig
from research.nn.on import On
from research.nn.sites import Node
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.fourierft import FourierFt
from research.peft.method import Sites, Variables
from research.peft.prefix import Prefix
from research.peft.shira import Shira
from research.peft.vera import Projections

__all__ = ("Loaded", "load", "save")


class Loaded(NamedTuple):
    """Our specification, the variables of base + adapter (and head), and what was left out."""

    spec: str
    variables: Variables
    notes: tuple[str, ...]


class _File:
    """The weights file, each tensor to be taken once."""

    def __init__(self, directory: Path):
        self.source = hf.SafetensorsSource(directory / WEIGHTS)
        self.left, self.missing = dict(self.source.shapes), []

    def peek(self, suffix: str) -> tuple[int, ...]:
        """The shape of the first tensor whose name ends so."""
        found = [shape for name, shape in self.source.shapes.items() if name.endswith(f".{suffix}")]
        if not found:
            raise ModelError(f"no tensor's name ends with {suffix}.")
        return found[0]

    def take(self, name: str, shape: tuple[int, ...], kind: type = np.floating) -> np.ndarray:
        """A tensor of this shape; zeros for one that is missing, of which `finish` tells."""
        if (found := self.left.pop(name, None)) is None:
            self.missing.append(name)
            return np.zeros(shape, np.float32 if kind is np.floating else np.int32)
        if found != shape:
            raise ModelError(f"{name} has shape {list(found)}, the configuration wants {list(shape)}.")
        value = self.source.read(name)
        if not jnp.issubdtype(value.dtype, kind):
            raise ModelError(f"{name} is of type {value.dtype}, not a {kind.__name__} one.")
        return value.astype(np.float32) if kind is np.floating else value

    def finish(self) -> None:
        """ModelError unless every tensor was there and was taken."""
        kinds = (sorted(self.missing), "missing"), (sorted(self.left), "unexpected")
        if told := [f"{len(names)} {kind}: {', '.join(names[:3])}" for names, kind in kinds if names]:
            raise ModelError(f"the tensors do not fit the configuration and this model: {'; '.join(told)}.")


def load(directory: str | Path, config: Config, params: tree.PyTree, sites: Sites) -> Loaded:
    """Reads an adapter directory for a base.

    Raises ModelError: files that are missing or broken, tensors that do not fit, an option without a counterpart.
    """
    directory = Path(directory)
    try:
        c = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{directory}: no {CONFIG}, so this is no adapter of Hugging Face PEFT.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / CONFIG}: cannot be read as JSON ({error}).") from None
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        raise ModelError(f"{directory}: {'only pickled weights, which can run code' if pickled else f'no {WEIGHTS}'}.")
    file = _File(directory)
    try:
        kind = c.get("peft_type")
        if kind not in TYPES:
            raise ModelError(f"peft_type {kind!r} has no counterpart here.{did_you_mean(str(kind), TYPES)}")
        known = TYPES[kind].options
        notes = hf_peft_config.check(c, known)
        spec, variables = _load(known | c, file, config, params, sites)
        file.finish()
    except (FlagError, ModelError) as error:
        raise ModelError(f"{directory}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
        raise ModelError(f"{directory}: {CONFIG} has a value that makes no sense ({error}).") from error
    return Loaded(spec, variables, tuple(notes))


def _load(c: Json, file: _File, config: Config, params: tree.PyTree, sites: Sites) -> tuple[str, Variables]:
    kind, bert = c["peft_type"], isinstance(config, BertConfig)
    headless = not any(name.startswith(UNDER + prefix(config)) for name in file.left)
    head = c.get("task_type") == "SEQ_CLS" and bool(c.get("modules_to_save"))
    if kind in SOFT and bert and head:
        raise ModelError("its classifier reads the first virtual token, and here the first real one.")
    if bert and head and not config.pooler:
        raise ModelError("its classifier reads the pooler's output, and this model has no pooler.")
    modules, where = _chosen(c, config, headless)
    ranks = {place: hf_peft_config.rank(c, module) for module, place in modules.items()}
    name, options = TYPES[kind].read(c, file.peek)
    spec = hf_peft_config.spec(name, options | hf_peft_config.rank_options(name, ranks) | where)
    method, variables = registry.parse(spec), {"params": params}

    def fresh() -> tree.PyTree:
        return peft.realised(method, {"peft": peft.init(method, jax.random.key(0), sites)}, sites)["peft"]

    nodes = tree.paths(_frozen(method, fresh), is_leaf=peft.is_node)
    if kind == "PREFIX_TUNING":
        nodes |= _read_prefixes(nodes, config, file)
    elif kind in SOFT:
        nodes = {
            p: n.replace(table=jnp.asarray(file.take("prompt_embeddings", n.table.shape))) for p, n in nodes.items()
        }
    else:
        names = {place: module for module, place in modules.items()}
        nodes = {path: _read_node(path, node, names, ranks, c, sites, file) for path, node in nodes.items()}
    if kind == "LN_TUNING":
        variables["params"] = _read_norms(c, params, config, headless, file)
    if head:
        variables["head"] = _read_head(kind, config, file)
    return spec, variables | {"peft": tree.unflatten(nodes)}


def _frozen(method: peft.Method, fresh: Callable[[], tree.PyTree]) -> tree.PyTree:
    """What `fresh` makes, but of the leaves that train the shapes alone."""
    shapes = jax.eval_shape(fresh)
    mask = peft.mask(method, {"params": {}, "peft": shapes})["peft"] if shapes else {}
    if jax.tree.leaves(tree.partition(shapes, mask)[1]):
        return tree.combine(jax.jit(lambda: tree.partition(fresh(), mask)[1])(), shapes)
    return shapes


def _chosen(c: Json, config: Config, headless: bool) -> tuple[dict[str, tuple[str, int]], Json]:
    """{their module: (our site, layer)} of what the adapter changes, and that as options of ours."""
    kind = c["peft_type"]
    if kind in SOFT or kind == "LN_TUNING":
        return {}, {}
    everything = keys.linears(config, headless)
    if kind == "ADAPTION_PROMPT":
        modules = dict(keys.attentions(config, c["adapter_layers"]))
        whole = len(modules) == config.num_layers
        return modules, {} if whole else {"layers": _ranges([i for _, i in modules.values()])}
    chosen = keys.matched(everything, c)
    if not chosen:
        raise ModelError(f"its option target_modules={c['target_modules']!r} matches no projection of this model.")
    modules, options = {name: everything[name] for name in everything if name in chosen}, {}
    if kind == "IA3":
        forward = keys.matched(chosen, c, "feedforward_modules") if c["feedforward_modules"] else set()
        options["feedforward"] = keys.pattern({modules[name][0] for name in forward}, set()) if forward else ""
        chosen -= forward
    targets = {modules[name][0] for name in chosen}
    options["targets"] = keys.pattern(targets, {site for site, _ in everything.values()})
    layers = {site: {i for s, i in modules.values() if s == site} for site, _ in modules.values()}
    inside = [numbers for site, numbers in layers.items() if site.startswith("layers/")]
    union = sorted(set().union(*inside))
    if any(numbers != set(union) for numbers in inside) and (kind not in ("LORA", "LOHA", "HIRA") or c.get("use_dora")):
        raise ModelError("its target_modules choose projections in some layers and others in others.")
    if inside and len(union) < config.num_layers:
        options["layers"] = _ranges(union)
    return modules, options


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2|5."""
    runs: list[list[int]] = []
    for n in numbers:
        runs = [*runs[:-1], [*runs[-1], n]] if runs and runs[-1][-1] == n - 1 else [*runs, [n]]
    return "|".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _read_node(
    path: str, node: Node, names: dict, ranks: dict[tuple[str, int], Rank], c: Json, sites: Sites, file: _File
) -> Node:
    """A fresh node with what the file holds."""
    inner = node.node if isinstance(node, On) else node
    if isinstance(inner, Projections):
        return inner.replace(**_read_projections(inner, c, file))
    arrays = {
        name: np.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else np.array(x)
        for name in peft.fields(inner)
        if (x := getattr(inner, name)) is not None
    }
    site = sites[path.rpartition("/")[0]]
    depth = site.stack.shape[0] if site.stack.shape else 1
    for place in keys.places(path, names, depth):
        rows, scale = ranks[place.site, place.layer]
        for key in keys.of(inner)[1]:
            if key.field in arrays:
                whole = arrays[key.field][place.index]
                shape = key.shape(whole.shape, None if rows is None else len(rows))
                value = file.take(f"{UNDER}{place.module}.{key.suffix}", shape)
                whole[key.at(rows)] = keys.signed(inner, key.read(value))
        if scale is not None:
            arrays["scale"][place.index] = scale
        if isinstance(inner, FourierFt):
            arrays["where"][place.index] = keys.torch_where(c["random_loc_seed"], site.shape, c["n_frequency"])
        if isinstance(inner, Shira):
            arrays["index"][place.index] = _read_index(
                f"{UNDER}{place.module}.shira_indices", site.shape, whole.size, file
            )
    inner = inner.replace(**{name: jnp.asarray(x) for name, x in arrays.items()})
    return node.replace(node=inner) if isinstance(node, On) else inner


def _read_index(name: str, shape: tuple[int, ...], count: int, file: _File) -> np.ndarray:
    """SHiRA's (out, in) pairs as flat places in a kernel [in, out]."""
    rows, columns = file.take(name, (2, count), np.integer).astype(np.int64)
    if not np.all((rows >= 0) & (rows < shape[1]) & (columns >= 0) & (columns < shape[0])):
        raise ModelError(f"{name} has places outside a kernel {list(shape[::-1])}.")
    return columns * shape[1] + rows


def _read_projections(node: Projections, c: Json, file: _File) -> dict[str, jax.Array]:
    """VeRA's shared matrices, which a file may leave to be drawn again."""
    rng, out = np.random.RandomState(c["projection_prng_key"]), {}
    for key in keys.of(node)[1]:
        shape = key.shape(getattr(node, key.field).shape, None)
        if c["save_projection"]:
            value = file.take(f"base_model.{key.suffix}", shape)
        else:
            value = keys.torch_uniform(rng, shape, (6 / shape[1]) ** 0.5)
        out[key.field] = jnp.asarray(key.read(value))
    return out


def _read_prefixes(nodes: dict[str, Node], config: Config, file: _File) -> dict[str, Node]:
    """prompt_embeddings (P, L * 2 * kv_heads * K): keys and values of each layer in turn."""
    prefixes = {path: node for path, node in nodes.items() if isinstance(node, Prefix)}
    length, *one = next(iter(prefixes.values())).k.shape[-3:]
    shape = (length, config.num_layers, 2, *one)
    flat = file.take("prompt_embeddings", (length, int(np.prod(shape[1:])))).reshape(shape)
    layers = np.moveaxis(flat, 0, 2)  # [L, 2, P, kv_heads, K]
    out = {}
    for path, node in prefixes.items():
        k, v = layers.swapaxes(0, 1) if path.startswith("layers/") else layers[keys.number(path)]
        out[path] = node.replace(k=jnp.asarray(k), v=jnp.asarray(v))
    return out


def _read_norms(c: Json, params: tree.PyTree, config: Config, headless: bool, file: _File) -> tree.PyTree:
    """The base's parameters with the norms that the file holds."""
    names = keys.norms(config, headless)
    chosen = keys.matched({name.rpartition(".")[0] for name in names}, c)
    flat = tree.paths(params)
    values: dict[str, np.ndarray] = {}
    for name, (ours, i) in names.items():
        module, _, leaf = name.rpartition(".")
        if module in chosen:
            path, index = keys.locate(flat, ours, i)
            whole = values.setdefault(path, np.array(flat[path]))
            whole[index] = file.take(f"{UNDER}{module}.ln_tuning_layers.{leaf}", whole[index].shape)
    return tree.map_with_path(lambda path, x: jnp.asarray(values[path], x.dtype) if path in values else x, params)


def _read_head(kind: str, config: Config, file: _File) -> dict[str, jax.Array]:
    name = keys.head_name(kind, config)
    classes = file.left.get(f"{name}.weight", (0,))[0]
    head = {"kernel": jnp.asarray(file.take(f"{name}.weight", (classes, config.hidden_size)).T)}
    bias = f"{name}.bias" in file.left
    return head | ({"bias": jnp.asarray(file.take(f"{name}.bias", (classes,)))} if bias else {})
