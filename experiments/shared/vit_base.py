"""A vision transformer as a directory: what pretraining leaves and everything else starts from.

    DIR/config.json          format, the model's configuration, classes, mean and std of a pixel, sha256 of the weights
    DIR/model.safetensors    "params/layers/attn/q/kernel", ..., and where it was trained "head/kernel", "head/bias"

`load` also takes `smoke`, a tiny random one, and what `research.convert.load` reads as a vision transformer: a Hugging
Face directory or hub id of a ViT, with its own head and class names if it has them, or of a CLIP, for its image tower.
Pixels are then normalised as its preprocessor_config.json says.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.convert import config_vision
from research.convert.fingerprint import fingerprint
from research.convert.load import load as load_pretrained
from research.errors import ModelError, UserError, did_you_mean
from research.files import os_error, replace_directory
from research.models.clip import ClipConfig
from research.models.registry import PRESETS, build
from research.models.stack import unstack
from research.models.vit import Vit, VitConfig
from research.peft import method as peft
from research.peft import tree
from research.quant.tree import quantise_tree

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
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
        spread = (2 / (x.shape[-2] + x.shape[-1])) ** 0.5 if path.endswith("kernel") else 0.02
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
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    kept = {"params": base.params} | ({} if base.head is None else {"head": base.head})
    leaves = {path: tree.whole(x) for path, x in tree.paths(kept).items()}

    def fill(folder: Path) -> None:
        try:
            save_file(leaves, folder / WEIGHTS)
        except SafetensorError as error:
            raise os_error(error, "weights not saved") from error
        record = {
            "format": FORMAT, "model": dataclasses.asdict(lasting(base.config)), "classes": list(base.classes),
            "mean": list(base.mean), "std": list(base.std), "sha256": _sha256(folder / WEIGHTS),
        }  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    ours = lambda d: _record(d) is not None  # noqa: E731
    return replace_directory(directory, fill, ours, needed=sum(x.nbytes for x in leaves.values()))


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
    if directory.is_dir() and (record := _record(directory)) is not None:
        return _saved(name, directory, record)
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
    if "head" in params:  # a base has it apart from its weights
        params, head = {k: v for k, v in params.items() if k != "head"}, params["head"]
        described = json.loads((found.path / CONFIG).read_text(encoding="utf-8"))
        classes = config_vision.labels(described) or tuple(f"LABEL_{i}" for i in range(config.num_classes))
        config = replace(config, num_classes=0)
    else:
        head = None
    mean, std = config_vision.pixels(found.path, found.config.family)
    return marked(VitBase(name, config, build(config), params, mean, std, classes, head))


def _record(directory: Path) -> dict[str, Any] | None:
    """What config.json of a base of ours says; None where it is not one."""
    try:
        record = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"format", "model", "sha256"} <= record.keys() else None


def _saved(name: str, directory: Path, record: dict[str, Any]) -> VitBase:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if record["format"] != FORMAT:
        raise ModelError(f"base {name} has format {record['format']!r}; this version reads {FORMAT}.")
    try:
        if _sha256(directory / WEIGHTS) != record["sha256"]:
            raise ModelError(f"base {name} is damaged: {WEIGHTS} is not the file that {CONFIG} describes.")
        leaves = tree.unflatten({path: jnp.asarray(x) for path, x in load_file(directory / WEIGHTS).items()})
        config = VitConfig(**record["model"])
        shapes = {path: x.shape for path, x in tree.paths(peft.base(build(config))[0]).items()}
        classes, head = tuple(record["classes"]), leaves.get("head")
        if {path: x.shape for path, x in tree.paths(leaves["params"]).items()} != shapes:
            raise ModelError(f"base {name} is damaged: its weights are not those of its configuration.")
        if head is not None and head["kernel"].shape != (config.hidden_size, len(classes)):
            raise ModelError(f"base {name} is damaged: its head is not one of {len(classes)} classes.")
        mean, std = (tuple(float(x) for x in record[key]) for key in ("mean", "std"))
    except UserError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"base {name} is damaged: {str(error).splitlines()[0]}.") from None
    return marked(VitBase(name, config, build(config), leaves["params"], mean, std, classes, head))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
