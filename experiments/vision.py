"""Trains vision transformers: a base from scratch, a PEFT method on it, a table of methods and tasks, an evaluation.

    python -m experiments.vision                                     # a small ViT on Fashion-MNIST: runs/vision/base
    python -m experiments.vision --mode=adapt --peft=lora:rank=4     # that base on 5,000 digits: an adapter
    python -m experiments.vision --mode=adapt --data=fashion-mnist --classes=5-9 --shots=20 --model=runs/vision-5/base
    python -m experiments.vision --mode=table --tune=3               # methods x tasks of VTAB's shape, three seeds
    python -m experiments.vision --mode=evaluate                     # accuracy of the base, and who is taken for whom
    python -m experiments.vision --mode=evaluate --adapter=runs/vision-adapt/adapter --data=mnist-5k
    python -m experiments.vision --smoke                             # any mode: tiny model, drawn figures, seconds

Differs from `classify` in what is read, and in having a base to make. --data takes fashion-mnist, mnist-5k, smoke, a
folder with one folder of images a class (or train/ and test/ of those), and hub:ID of `datasets`. The same command goes
on where an interrupted run was. --model takes a preset to pretrain, and else a base's directory or a Hugging Face ViT
or CLIP. Writes config.json, metrics.jsonl, curve.png, checkpoints, base or adapter, result.json, confusion.png and
attention.png under --workdir; the table's files are `experiments.shared.vision_table`'s. Guide: docs/vision.md.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.shared import attention, augmenting, common, entries, images, training, vision_table, vit_base, vtab
from experiments.shared.classification import check
from experiments.shared.dry_run import dry_run
from experiments.shared.entries import Entry
from experiments.shared.images import Data, Recipe
from experiments.shared.vit_base import VitBase
from research.data.images import Images
from research.errors import FlagError, ModelError
from research.models.registry import preset
from research.models.vit import POOLINGS, VitConfig
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import registry
from research.train.lock import lock

# What a mode does where no flag says otherwise, and with --smoke.
SMALL = VitConfig(28, 1, 1, 128, 4, 4, 512, pooling="gap", stem=(32, 64, 128))
MODES: dict[str, dict[str, Any]] = {
    "pretrain": {
        "data": "fashion-mnist", "peft": "full", "learning_rate": 1e-3, "steps": 12000, "batch_size": 64,
        "schedule": "cosine", "warmup": 0.02, "weight_decay": 0.05, "augment": "crop=1,flip", "workdir": "runs/vision",
    },
    "adapt": {
        "data": "mnist-5k", "peft": "lora:rank=4", "learning_rate": 5e-3, "steps": 300, "batch_size": 32,
        "schedule": "cosine", "warmup": 0.06, "weight_decay": 0.01, "augment": "none", "workdir": "runs/vision-adapt",
    },
    "table": {
        "learning_rate": 0.0, "steps": 300, "batch_size": 32, "schedule": "cosine", "warmup": 0.06,
        "weight_decay": 0.01, "augment": "none", "workdir": "runs/vision-table",
    },
    "evaluate": {"workdir": "runs/vision-evaluate"},
}  # fmt: skip
SMOKE = {"data": "smoke", "steps": 24, "batch_size": 16}
SHAPE = {"size": "pixels of a side", "channels": "1 or 3", "patch": "pixels of a patch's side", "depth": "layers"}
SHAPE |= {"width": "of the hidden state", "heads": "of attention"}
SHARE = {"pretrain": 0.05, "adapt": 0.2}  # of the training part, for validation


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names. None: what the mode has in MODES."""
    common.model_flags(None)
    flags.DEFINE_enum("mode", "pretrain", list(MODES), "What to do.")
    flags.DEFINE_string("data", None, "fashion-mnist, mnist-5k, smoke, a folder of images by class, or hub:ID.")
    flags.DEFINE_string("classes", None, "Classes to keep, by number or name, such as 0-4 or bag,shirt.")
    flags.DEFINE_integer("shots", None, "Training images of each class; all by default.", lower_bound=1)
    flags.DEFINE_string("peft", None, "Method specification, such as lora:rank=4 or vpt:length=10.")
    flags.DEFINE_string("augment", None, "none, or some of crop=2,flip,randaugment=2,erasing,mixup,cutmix,smoothing.")
    own = ("learning_rate", "steps", "batch_size", "schedule", "warmup", "weight_decay")
    training.recipe_flags(**dict.fromkeys(own))
    flags.DEFINE_float("layer_decay", 1.0, "Factor of the learning rate from a layer to the one before it.")
    flags.DEFINE_float("drop_path", 0.0, "Probability that a sublayer is left out for an image.", 0.0, 0.999)
    for name, what in SHAPE.items():
        flags.DEFINE_integer(name, None, f"Of a base to pretrain: {what}.", lower_bound=1)
    flags.DEFINE_string(
        "stem", None, "Of a base to pretrain: channels of convolutions, 32,64 or none; --patch is of theirs."
    )
    flags.DEFINE_enum("pooling", None, list(POOLINGS), "Of a base to pretrain: what the head reads.")
    training.run_flags(None, eval_every=1000, save_every=500)
    flags.DEFINE_string("methods", None, "--mode=table: names or specifications apart by semicolons, each with @rate.")
    flags.DEFINE_string("tasks", None, "--mode=table: small, vtab, or tasks of either apart by commas.")
    flags.DEFINE_integer("seeds", 3, "--mode=table: runs of each cell.", lower_bound=1)
    flags.DEFINE_integer("tune", 0, "--mode=table: rates a factor of 3 apart to try for each cell.", lower_bound=0)
    flags.DEFINE_string("adapter", None, "--mode=evaluate: an adapter directory.")
    flags.DEFINE_bool("force", False, "Load an adapter although it was trained on another base.")
    flags.DEFINE_bool("smoke", False, "A tiny random model on drawn figures: shows that everything works, no more.")


def main() -> None:
    values = flags.FLAGS
    given = {name: values[name].value for name in MODES["pretrain"]}
    defaults = MODES[values.mode] | (SMOKE if values.smoke else {})
    settings = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    if values.workdir is None and values.smoke:
        settings["workdir"] += "-smoke"
    if values.untie:
        raise FlagError("--untie is for language models: a vision transformer has no token table.")
    if values.attention != "xla":
        raise FlagError(f"--attention={values.attention} is for the families of LLaMA and GPT-2: leave it out.")
    if values.adapter is not None and values.mode != "evaluate":
        raise FlagError("--adapter is for --mode=evaluate.")
    if values.smoke:  # nothing here is worth an optimising compiler's time; XLA reads this when its backend starts
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    workdir = Path(settings["workdir"]).expanduser()
    if values.mode == "evaluate":
        return evaluate(values, settings["data"], workdir)
    shared = common.flag_values("micro_batches", "optimizer", "clip_norm", "layer_decay")
    recipe = Recipe(**shared, **{k: v for k, v in settings.items() if k in Recipe.__dataclass_fields__})
    return (table if values.mode == "table" else train)(values, settings, recipe, workdir)


def load_base(values: Any) -> VitBase:
    """The base to adapt."""
    name = values.model or ("smoke" if values.smoke else f"{MODES['pretrain']['workdir']}/base")
    own = common.flag_values("quantise", "dtype", "remat", "drop_path")
    return vit_base.load(name, **own)


def new_config(values: Any) -> VitConfig:
    """The configuration of a base to pretrain: --model's preset or the default, with the flags' changes.

    ModelError where that is no vision transformer, or the patch does not divide the size.
    """
    config = preset(values.model) if values.model else vit_base.SMOKE if values.smoke else SMALL
    if not isinstance(config, VitConfig):
        raise ModelError(f"{values.model} does not see images. Valid: {', '.join(vit_base.SIZES)}.")
    fields = {"size": "image_size", "depth": "num_layers", "width": "hidden_size", "heads": "num_heads"}
    changes = {
        fields.get(name, name): values[name].value for name in (*SHAPE, "pooling") if values[name].value is not None
    }
    if values.stem is not None or values.patch is not None:
        changes["stem"] = stem_of(values.stem or "none")
    if values.width:
        changes["intermediate_size"] = 4 * values.width
    config = replace(config, num_classes=0, **changes, **common.flag_values("dtype", "remat", "drop_path"))
    _ = config.grid  # a patch that does not divide the size is told before the data is read
    return replace(config, scan=config.num_layers > 8)  # a CPU runs few unrolled layers a fifth faster than a scan


def stem_of(text: str) -> tuple[int, ...]:
    """ "32,64" as (32, 64), "none" as (). FlagError."""
    if text == "none":
        return ()
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise FlagError(f"--stem={text!r} is no list of channels. Valid: none, or such as 32,64.")
    return tuple(map(int, text.split(",")))


def train(values: Any, settings: dict[str, Any], recipe: Recipe, workdir: Path) -> None:
    """--mode=pretrain and --mode=adapt: trains, evaluates, saves what has trained."""
    scratch, spec, augment = values.mode == "pretrain", settings["peft"], augmenting.parse(settings["augment"])
    if scratch and (spec != "full" or values.quantise):
        raise FlagError("--mode=pretrain trains a whole base: --peft=full, unquantised. --mode=adapt is for methods.")
    with training.use_mesh(values.mesh, several=True) as mesh, lock(workdir):
        base = None if scratch else load_base(values)
        config = new_config(values) if scratch else base.config
        part = {"classes": values.classes, "shots": values.shots, "seed": values.seed}
        data = images.load_data(settings["data"], config, SHARE[values.mode], **part)
        if scratch:
            name = values.model or ("smoke" if values.smoke else "small")
            base = vit_base.fresh(name, config, *images.statistics(data.train, config.channels), values.seed)
        check(base, spec)
        run = images.start(base, spec, data.train, recipe, values.seed, augment, mesh)
        print(f"{training.summary(base, spec, run)}, and a head of {len(data.classes)} classes")
        batch = images.batches(data.train, recipe, values.seed)
        if values.dry_run:
            return print(dry_run(run, batch, recipe, mesh, describe(data, config)))
        identity = {
            "base": base.fingerprint, "data": data.fingerprint, "peft": spec, "seed": values.seed,
            "augment": settings["augment"], "drop_path": values.drop_path, "dtype": values.dtype,
            "recipe": common.jsonable(recipe),
        }  # fmt: skip
        identity |= {} if values.quantise is None else {"quantise": values.quantise}
        trainable, total = training.counts(run)
        result = training.train(
            run, batch, recipe, workdir, identity, mesh=mesh, label=values.mode, unit="images",
            evaluate=training.evaluator(run, images.arrays(data.validation), 100),
            eval_every=values.eval_every, save_every=values.save_every, curve=("loss", "eval/loss", "eval/accuracy"),
        )  # fmt: skip
        trained = result.state.variables(run.frozen)
        found = images.predictor(base, run.method, run.sites)(trained, data.test)
        scores = report(found, data.test, workdir)
        if scratch:
            where = workdir / "base"
            size = vit_base.save(where, images.trained_base(base, run, result.state, data.classes))
        else:
            where, told = workdir / "adapter", {"seed": values.seed, "accuracy": scores["accuracy"]}
            size = images.save_adapter(
                where, base, spec, run, result.state, data.classes, data=settings["data"], **told
            )
        told = {"test": scores, "trainable": trainable, "total": total, "seconds": result.seconds}
        common.write_json(workdir / "result.json", told)
        if mesh is None:  # eight images are no batch to share out
            realised = peft.realised(run.method, trained, run.sites)
            attention.draw(base, realised, data.test, found, workdir / "attention.png")
    print(line(scores, len(found)))
    print(f"{where.name}: {where} ({size:,} bytes), {result.seconds:.0f} s of training")


def describe(data: Data, config: VitConfig) -> str:
    """What is learnt from."""
    sizes = ", ".join(f"{len(getattr(data, part).labels)} {part}" for part in ("train", "validation", "test"))
    first = data.train
    return (
        f"{sizes} images of {'x'.join(map(str, first.images.shape[1:]))}, seen as {config.image_size}x"
        f"{config.image_size}x{config.channels} in {config.patches} patches\n"
        f"label {first.classes[first.labels[0]]!r}: pixels {first.images[0].min()} to {first.images[0].max()}"
    )


def report(found: np.ndarray, test: Images, workdir: Path) -> dict[str, Any]:
    """Accuracy, each class's, and the confusion matrix [C, C], true by predicted; confusion.png shows it."""
    matrix = images.confusion(found, test.labels, len(test.classes))
    images.draw_confusion(matrix, test.classes, workdir / "confusion.png")
    of = np.diag(matrix) / np.maximum(matrix.sum(axis=1), 1)
    return {
        "accuracy": float(np.mean(found == test.labels)), "confusion": matrix.tolist(),
        "classes": dict(zip(test.classes, of.tolist(), strict=True)),
    }  # fmt: skip


def line(scores: dict[str, Any], rows: int) -> str:
    """The result in a line, with the class that is hardest."""
    worst = min(scores["classes"], key=scores["classes"].get)
    hard = f"hardest class {worst!r}: {scores['classes'][worst]:.4f}"
    return f"test accuracy {scores['accuracy']:.4f} over {rows} images; {hard}"


def table(values: Any, settings: dict[str, Any], recipe: Recipe, workdir: Path) -> None:
    """--mode=table."""
    default = (vision_table.SMOKE_METHODS, "smoke,smoke-count") if values.smoke else (vision_table.METHODS, "small")
    todo, tasks = entries.parse(values.methods or default[0], values.smoke), vtab.parse(values.tasks or default[1])
    if refused := [name for name in ("data", "classes", "shots", "peft", "mesh") if values[name].present]:
        raise FlagError(f"--{refused[0]} is not for --mode=table, which has --tasks and --methods.")
    augmenting.parse(settings["augment"])
    training.one_process()
    with lock(workdir):
        base = load_base(values)
        todo = applicable(todo, base, skip=(values.methods or "").strip() == "all")
        if values.dry_run:
            return print(f"{len(tasks)} tasks x {len(todo)} methods x {values.seeds} seeds of {recipe.steps} steps")
        same = {"seeds": values.seeds, "tune": values.tune, "augment": settings["augment"], "dtype": values.dtype}
        same |= {"drop_path": values.drop_path, "base": base.fingerprint}
        same |= {} if values.quantise is None else {"quantise": values.quantise}
        vision_table.fill(base, todo, tasks, recipe, same, workdir)
    print((workdir / "table.md").read_text(encoding="utf-8"))
    print(f"table.md, table.csv and table.png are in {workdir}")


def applicable(todo: list[Entry], base: VitBase, skip: bool) -> list[Entry]:
    """The methods that have something to train on the model; with `skip` the others are left out with a line."""
    kept = []
    for entry in todo:
        try:
            check(base, entry.spec)
            kept.append(entry)
        except FlagError as error:
            if not skip:
                raise
            print(f"{entry.name} is left out: {error}")
    return kept


def evaluate(values: Any, source: str | None, workdir: Path) -> None:
    """--mode=evaluate: a base by its own head, or an adapter."""
    loaded = None if values.adapter is None else adapters.load(values.adapter)
    if loaded is None:
        base, method = load_base(values), registry.parse("full")
        if base.head is None:
            raise ModelError(f"base {base.name} has no head of its own: give an --adapter that has one.")
        variables, classes = {"params": base.params, "peft": {}, "head": base.head}, base.classes
    else:
        if loaded.meta.get("task") != "image" or not isinstance(loaded.meta.get("classes"), list):
            raise ModelError(f"adapter {values.adapter} is for task {loaded.meta.get('task')!r}, not 'image'.")
        own = common.flag_values("quantise", "dtype", "remat")
        base = vit_base.load(values.model or loaded.meta["base"]["name"], **own)
        method, classes = loaded.method, tuple(loaded.meta["classes"])
        variables = images.attach(loaded, base, peft.sites(base.model), values.force)
    source = source or (loaded.meta.get("data") if loaded else MODES["pretrain"]["data"])
    loader = vtab.load if source in vtab.TASKS else images.load_parts
    test = images.matching(loader(source, base.config)[1], classes)
    with lock(workdir):
        sites = peft.sites(base.model)
        found = images.predictor(base, method, sites)(variables, test)
        scores = report(found, test, workdir)
        attention.draw(base, peft.realised(method, variables, sites), test, found, workdir / "attention.png")
        common.write_config(workdir)
        common.write_json(workdir / "result.json", {"test": scores})
    print(line(scores, len(found)))
    print(f"confusion.png, attention.png and result.json are in {workdir}")


if __name__ == "__main__":
    define_flags()
    common.run(main)
