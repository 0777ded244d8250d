"""A vision transformer as a directory: what pretraining leaves and everything else starts from.

A base of ours is a directory as `own_model` writes them: a ViT with a head, the names of the classes that it was
trained on, and the mean and std of a pixel. `load` also takes `smoke`, a tiny random one, and what
`research.convert.load` reads as a vision transformer: a Hugging Face directory or hub id of a ViT, with its own head
and class names if it has them, or of a CLIP, for its image tower. Pixels are then normalised as its
preprocessor_config.json says.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.shared import own_model
from research.convert import config_vision
from research.convert.fingerprint import fingerprint
from research.convert.load import load as load_pretrained
from research.errors import ModelError, did_you_mean
from research.models.clip import ClipConfig
from research.models.registry import PRESETS, build
from research.models.stack import unstack
from research.models.vit import Vit, VitConfig
from research.peft import method as peft
from research.peft import tree
from research.quant.tree import quantise_tree

TASK, CONFIG = "vision", "config.json"
SMOKE = VitConfig(12, 4, 1, 32, 2, 4, 64, pooling="gap")
SIZES = [name for name, config in PRESETS.items() if isinstance(config, VitConfig)]


@dataclass(frozen=True)
class VitBase:
    """A model that sees pixels / 255 as (x - mean) / std. head: kernel [D, C] and bias [C] for `classes`, or None."""

    name: str
    config: VitConfig
    model: Vit
    params: tree.PyTree
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    head: dict[str, Any] | None = None
    fingerprint: str = ""
    tokenizer: None = None


def fresh(name: str, config: VitConfig, mean: tuple[float, ...], std: tuple[float, ...], seed: int = 0) -> VitBase:
    """A random one. Kernels are Xavier's, as in the paper's code: at width 128 the model's own N(0, 0.02^2) would be
    four times smaller, and learns later. Drawn by NumPy: compiling `init` would take seconds. Scanned and unrolled
    layers get the same numbers.
    """
    draw = np.random.default_rng(seed)

    def leaf(path: str, x: Any) -> Any:
        if path.endswith(("scale", "bias")):
            return jnp.full(x.shape, path.endswith("scale"), x.dtype)
        area = math.prod(x.shape[:-2]) if "/stem_" in path else 1  # places that a convolution sees
        spread = (2 / (area * (x.shape[-2] + x.shape[-1]))) ** 0.5 if path.endswith("kernel") else 0.02
        return jnp.asarray(spread * draw.normal(size=x.shape), x.dtype)

    params = tree.map_with_path(leaf, peft.base(build(replace(config, scan=True)))[0])
    params = params if config.scan else unstack(params)
    return marked(VitBase(name, config, build(config), params, tuple(mean), tuple(std)))


def marked(base: VitBase) -> VitBase:
    """With its fingerprint: the weights, the configuration and what a pixel becomes before the model sees it."""
    pixels = {"mean": np.asarray(base.mean, np.float32), "std": np.asarray(base.std, np.float32)}
    return replace(base, fingerprint=fingerprint(base.params | {"pixels": pixels}, lasting(base.config)))


def lasting(config: VitConfig) -> VitConfig:
    """Without what is a run's own: how it is computed, and what training leaves out at random."""
    own = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0}
    return replace(config, **own, dtype="float32", param_dtype="float32", scan=True, remat="none")


def save(directory: Path, base: VitBase) -> int:
    """Writes a base's directory atomically and returns its bytes. ModelError where it can't be written."""
    config, params = lasting(base.config), base.params
    if base.head is not None:
        config, params = replace(config, num_classes=len(base.classes)), params | {"head": base.head}
    more = {"classes": list(base.classes), "mean": list(base.mean), "std": list(base.std)}
    return own_model.save(directory, TASK, config, params, **more)


def load(name: str, *, quantise: str | None = None, **options: Any) -> VitBase:
    """The base of a directory, `smoke`, or a Hugging Face vision transformer, its layers' kernels quantised if asked.

    options: fields of the configuration that are a run's own: dtype, remat, drop_path. The fingerprint stays.
    Raises ModelError: nothing of that name, or files that are broken or altered.
    """
    base = _find(name)
    config = replace(base.config, **options)
    params = base.params if quantise is None else quantise_tree(base.params, quantise)
    return replace(base, config=config, model=build(config), params=params)


def _find(name: str) -> VitBase:
    if name == "smoke":
        return fresh(name, SMOKE, (0.5,), (0.5,))
    directory = Path(name).expanduser()
    if directory.is_dir() and own_model.task_of(directory):
        return _saved(name, directory)
    if directory.is_dir() and not (directory / CONFIG).exists():
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:5]) or "it is empty"
        raise ModelError(f"{name} is no vision base: it has no {CONFIG} ({found}).")
    if name in PRESETS:
        raise ModelError(f"{name} is a preset without weights: --mode=pretrain trains one, whose directory is a base.")
    if not directory.is_dir() and ("/" not in name or name.startswith((".", "/", "~", "runs/"))):
        raise ModelError(f"no vision base {name!r}: --mode=pretrain makes one.{did_you_mean(name, ['smoke'])}")
    found = load_pretrained(name)
    config, params, classes = found.config, found.params, ()
    if isinstance(config, ClipConfig):
        config, params = config.towers()[1], params["vision"]
    elif not isinstance(config, VitConfig):
        raise ModelError(f"{name} is a {config.family} model, which does not see images.")
    if config.num_classes:
        described = json.loads((found.path / CONFIG).read_text(encoding="utf-8"))
        classes = config_vision.labels(described) or tuple(f"LABEL_{i}" for i in range(config.num_classes))
    mean, std = config_vision.pixels(found.path, found.config.family)
    return _apart(name, config, params, mean, std, classes)


def _saved(name: str, directory: Path) -> VitBase:
    found = own_model.load(directory, TASK)
    try:
        classes = tuple(map(str, found.record["classes"]))
        mean, std = (tuple(float(x) for x in found.record[key]) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model {directory} is damaged: {error}.") from None
    if len(classes) != found.config.num_classes:
        raise ModelError(f"model {directory} is damaged: its head is not one of {len(classes)} classes.")
    return _apart(name, found.config, found.params, mean, std, classes)


def _apart(
    name: str,
    config: VitConfig,
    params: tree.PyTree,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: tuple[str, ...],
) -> VitBase:
    """A base has its head apart from its weights."""
    rest, config = {k: v for k, v in params.items() if k != "head"}, replace(config, num_classes=0)
    return marked(VitBase(name, config, build(config), rest, mean, std, classes, params.get("head")))
