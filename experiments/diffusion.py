"""Trains a denoiser of images that is told classes or captions, and adapts a trained one by any method.

    python -m experiments.diffusion                                             # Fashion-MNIST; writes WORKDIR/model
    python -m experiments.diffusion --data=emoji --condition=text --model=dit-mini64 --batch_size=64 --steps=1500
    python -m experiments.diffusion --classes=0-7 --workdir=runs/eight          # on eight of its ten classes
    python -m experiments.diffusion --base=runs/eight/model --peft=lora:rank=8,targets=all --classes=8,9 --images=50
    python -m experiments.diffusion --mode=table --base=runs/eight/model --classes=8,9 --images=50 --steps=500
    python -m experiments.diffusion --smoke                                     # seconds, without a network

Differs from `sample_images`, which draws from what is trained here and measures it: here samples are drawn while it
trains. The same command goes on where an interrupted run was. Writes config.json, metrics.jsonl, curve.png,
distance.png (against minutes), samples/stepN.png, checkpoints and model (or adapter) under --workdir; the table writes
table.md, table.csv and sheet.png.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.shared import captions, common, training
from experiments.shared.denoising import PROCESSES, Denoiser, Sampling, Setting, drawer, fresh, generate, load, sized
from experiments.shared.diffusion_run import Recipe, Task, Watch, batches, distance_curve, save_adapter, start, train
from experiments.shared.diffusion_table import DEFAULT, table
from experiments.shared.dry_run import dry_run
from experiments.shared.pictures import choose, in_turn, load_images, of_classes, to_float
from research.data.images import Images
from research.diffusion import samplers, weights
from research.diffusion.parameterise import KINDS, parameterisation
from research.errors import DataError, FlagError, did_you_mean
from research.models import dit, unet
from research.train.lock import lock

SETTING = ("process", "shift", "predict", "label_dropout")  # flags that a base brings with it
SHAPE = ("model", "patch", "width", "layers", "condition", "text_model")
SMOKE = {
    "data": "smoke", "model": "dit-tiny", "text_model": "smoke", "patch": 4, "width": 32, "layers": 2, "steps": 8,
    "batch_size": 16, "eval_every": 4, "save_every": 4, "sample_steps": 3, "frechet": 16, "features": "pixels",
    "prior_images": 16, "table_images": 16,
}  # fmt: skip


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_enum("mode", "train", ["train", "table"], "Train one run, or a table of methods on --base.")
    flags.DEFINE_string("data", "fashion-mnist", "Packaged image set, folder of images by class, hub:ID, or smoke.")
    flags.DEFINE_integer("size", None, "Side in pixels that a folder's images get.", lower_bound=4)
    flags.DEFINE_enum("channels", None, ["1", "3"], "Of a folder's images.")
    flags.DEFINE_string("classes", None, "Numbers, ranges or names of the classes to learn. Default: all.")
    flags.DEFINE_integer("images", 0, "Images of each class to learn from; 0 for all.", lower_bound=0)
    flags.DEFINE_string("model", "dit-tiny", "Preset of a DiT or UNet; size, channels and classes are the data's.")
    flags.DEFINE_integer("patch", None, "Side of a DiT's patches. Default: the preset's.", lower_bound=1)
    flags.DEFINE_integer("width", None, "Width of the model. Default: the preset's.", lower_bound=4)
    flags.DEFINE_integer("layers", None, "Layers of a DiT. Default: the preset's.", lower_bound=1)
    flags.DEFINE_enum("condition", "class", ["class", "text", "none"], "What the model is told of an image.")
    flags.DEFINE_string("text_model", "minilm-l6", "With --condition=text: what makes vectors of captions.")
    flags.DEFINE_string("base", None, "Directory of a trained denoiser to adapt, such as runs/diffusion/model.")
    flags.DEFINE_string("peft", None, "Method specification. Default: full, and lora:rank=8,targets=all with --base.")
    flags.DEFINE_float("prior", 1.0, "Weight of the base's own samples beside new classes; 0 for none.", lower_bound=0)
    flags.DEFINE_integer("prior_images", 500, "How many of them are drawn.", lower_bound=1)
    flags.DEFINE_enum("process", "flow", PROCESSES, "How noise is added.")
    flags.DEFINE_float("shift", 1.0, "Of flow: above 1, more of the times are noisy.")
    flags.DEFINE_enum("predict", "flow", KINDS, "What the network predicts.")
    flags.DEFINE_float("label_dropout", 0.1, "Share of images it is told nothing of.", lower_bound=0, upper_bound=1)
    flags.DEFINE_enum("weight", "uniform", weights.WEIGHTS, "Weight of the loss over time.")
    flags.DEFINE_float("gamma", 5.0, "Bound of min_snr.", lower_bound=0)
    flags.DEFINE_enum("times", "logit_normal", weights.TIMES, "How times are drawn.")
    flags.DEFINE_bool("low_discrepancy", True, "Spread the times of a batch evenly.")
    flags.DEFINE_float("ema", 0.999, "Decay of the averaged parameters, which are sampled from and saved.")
    flags.DEFINE_enum("sampler", "heun", sorted(samplers.SAMPLERS), "How samples are drawn.")
    flags.DEFINE_integer("sample_steps", 12, "Its steps; heun calls the model twice in each.", lower_bound=1)
    flags.DEFINE_float("guidance", 1.0, "Weight of classifier-free guidance; 1 is none.")
    flags.DEFINE_integer("frechet", 1000, "Samples measured at each evaluation; 0 for none.", lower_bound=0)
    flags.DEFINE_string("features", "auto", "Feature network: packaged, pixels, a directory or auto, which fits.")
    flags.DEFINE_string("methods", DEFAULT, "Rows of the table: names, or specifications with @rate split by ;.")
    flags.DEFINE_integer("table_images", 1000, "Samples of new and of old classes a row is measured by.", lower_bound=2)
    flags.DEFINE_bool("smoke", False, "A tiny model on tiny images, for a look at how it goes.")
    training.recipe_flags(
        learning_rate=1e-3, steps=12000, batch_size=128, schedule="wsd", warmup=0.02, weight_decay=0.0
    )
    training.run_flags("runs/diffusion", eval_every=1000, save_every=500)


def main() -> None:
    values = flags.FLAGS
    if values.smoke:
        for name, value in SMOKE.items():
            if not (values.base and name in SHAPE):
                values.set_default(name, value)
    if values.mode == "table":
        if not values.base:
            raise FlagError("--mode=table adapts a trained denoiser: give --base=DIRECTORY.")
        if values.peft:
            raise FlagError("--peft is of one run: the rows of --mode=table are --methods.")
        return make_table(values)
    if values.peft not in (None, "full") and not values.base:
        raise FlagError(f"--peft={values.peft} adapts a trained denoiser: give --base=DIRECTORY, or train one first.")
    train_one(values)


def train_one(values: Any) -> None:
    """Trains, and saves a model or an adapter."""
    recipe = Recipe(**common.flag_values(*Recipe.__dataclass_fields__))
    workdir = Path(values.workdir).expanduser()
    with training.use_mesh(values.mesh, several=True) as mesh, lock(workdir):
        task = prepare(values)
        base, spec = task.base, values.peft or ("lora:rank=8,targets=all" if values.base else "full")
        run = start(task, spec, recipe, values.seed, mesh)
        print(training.summary(base, spec, run) + (f", and {len(task.new)} rows of new classes" if task.new else ""))
        if values.dry_run:
            return print(dry_run(run, batches(task, recipe, values.seed), recipe, mesh, described(task)))
        watch = Watch(task, run, recipe, sampling(values), workdir, values.frechet, values.features)
        state, result = train(
            task, spec, recipe, values.seed, run, workdir, watch, mesh=mesh, label="diffusion",
            eval_every=values.eval_every, save_every=values.save_every,
        )  # fmt: skip
        trained = state.variables(run.frozen)
        if values.base:
            where = workdir / "adapter"
            size = save_adapter(where, task, spec, run, trained)
        else:
            where = workdir / "model"
            size = Denoiser(str(where), base.config, base.model, trained["params"], base.setting, "").save(where)
    distance_curve(workdir)
    last = next(row for row in reversed(result.history) if "eval/loss" in row)
    told = [f"{name} {last[f'eval/{name}']:.4g}" for name in ("loss", "frechet", "consistency", "minutes")
            if f"eval/{name}" in last]  # fmt: skip
    print(f"step {last['step']}: {', '.join(told)}; samples in {workdir / 'samples'}")
    print(f"{where.name}: {where} ({size:,} bytes)")


def make_table(values: Any) -> None:
    """Adapts by each method, and writes the table."""
    recipe = Recipe(**common.flag_values(*Recipe.__dataclass_fields__))
    with training.use_mesh(values.mesh) as mesh, lock(Path(values.workdir).expanduser()):
        task = prepare(values)
        train_part, test = images(values)
        table(task, train_part, test, recipe, sampling(values), values, mesh)


def images(values: Any) -> tuple[Images, Images]:
    """The training and the test part of --data."""
    return load_images(values.data, values.size, None if values.channels is None else int(values.channels))


def sampling(values: Any) -> Sampling:
    """How samples are drawn while it trains."""
    return Sampling(values.sampler, values.sample_steps, values.guidance)


def prepare(values: Any) -> Task:
    """From flags to what is learnt from. Raises FlagError, DataError and ModelError before anything is trained."""
    data, test = images(values)
    given = [name for name in (*SETTING, *SHAPE) if values[name].present]
    if values.base:
        base = load(values.base)
        if base.setting.classes != data.classes:
            raise DataError(f"{values.data} has classes {', '.join(data.classes)}; "
                            f"the base knows {', '.join(base.setting.classes)}.")  # fmt: skip
        side = (base.config.image_size, base.config.image_size, base.config.channels)
        if side != data.images.shape[1:]:
            wants, found = ("x".join(map(str, shape)) for shape in (side, data.images.shape[1:]))
            raise DataError(f"{values.data} has images of {found}; the base draws {wants}.")
        if given:
            raise FlagError(f"--{given[0]} is settled by --base: leave it away.")
    classes = choose(values.classes, data.classes)
    own, held = of_classes(data, classes, values.images, values.seed), of_classes(test, classes)
    if not values.base:
        base = untrained(values, data, own, classes)
    new = tuple(c for c in classes if c not in base.setting.trained) if values.base and base.config.num_classes else ()
    prior = None
    if new and values.prior and not values.dry_run:
        print(f"drawing {values.prior_images} images of the base's own classes ...", flush=True)
        labels = in_turn(base.setting.trained, values.prior_images)
        told = {"labels": labels}
        drawn = generate(drawer(base, sampling(values)), {"params": base.params}, told, len(labels), values.seed)
        prior = Images(drawn, labels, data.classes, tuple(data.classes[label] for label in labels))
    options = common.flag_values("weight", "gamma", "times", "low_discrepancy")
    return Task(base, own, held, classes, new, prior, values.prior, options)


def untrained(values: Any, data: Images, own: Images, classes: tuple[int, ...]) -> Denoiser:
    """A new model for the data."""
    presets = dit.PRESETS | unet.PRESETS
    if values.model not in presets:
        raise FlagError(f"--model: no denoiser is called {values.model!r}.{did_you_mean(values.model, presets)}")
    shape = {name: values[name].value for name in ("patch", "width", "layers")}
    reads = captions.encoder(values.text_model).base if values.condition == "text" else None
    count = len(data.classes) if values.condition == "class" else 0
    config = sized(presets[values.model], data, count, reads.config.hidden_size if reads else 0, **shape)
    spread = round(float(np.std(to_float(own.images))), 4)
    setting = Setting(**common.flag_values(*SETTING), sigma_data=spread, classes=data.classes, trained=classes,
                      encoder=(values.text_model, reads.fingerprint) if reads else ())  # fmt: skip
    parameterisation(setting.predict, setting.make_process())  # whether the two go together
    return fresh(values.model, config, setting, values.seed)


def described(task: Task) -> str:
    """What is learnt from, class by class."""
    names, labels = task.train.classes, task.train.labels
    return "\n".join(f"class {c} {names[c]!r}: {int((labels == c).sum())} images" for c in task.classes)


if __name__ == "__main__":
    define_flags()
    common.run(main)
