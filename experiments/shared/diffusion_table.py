"""The table of `diffusion`: methods that teach a trained denoiser new classes, and what each forgets of old ones."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.features import Network, network, score
from experiments.shared import common, entries, training
from experiments.shared.denoising import Draw, Sampling, drawer, generate
from experiments.shared.diffusion_run import Recipe, Task, Watch, identity, save_adapter, start, train
from experiments.shared.pictures import evenly, of_classes, sheet
from research.data.images import Images
from research.diffusion.frechet import Moments
from research.errors import FlagError
from research.files import write_bytes, write_text
from research.peft import adapter as adapters
from research.peft.method import Variables

# Each adapts all the layers it can, and the rows of new classes with them. The rates are starting points.
ROWS = {
    "full": "full@3e-4",
    "rows": "linear_probe@1e-2",
    "lora": "lora:rank=8,targets=all@3e-3",
    "dora": "dora:rank=8,targets=all@3e-3",
    "ia3": "ia3@2e-2",
    "houlsby": "houlsby:width=32@3e-3",
    "bitfit": "bitfit@5e-3",
    "prefix": "ptuning_v2:length=8@1e-2",
}
DEFAULT = ",".join(ROWS)
SHOWN = 5  # samples of each new class in the sheet
BATCH = 128  # images drawn at once
CELLS = {
    "method": ("method", ""),
    "trainable": ("trainable", ","),
    "new FD": ("new", ".4g"),
    "new consistency": ("new_consistency", ".3f"),
    "old FD": ("old", ".4g"),
    "old consistency": ("old_consistency", ".3f"),
    "rate": ("rate", "g"),
    "train s": ("seconds", ".0f"),
    "adapter kB": ("kilobytes", ",.0f"),
}


class Measure(NamedTuple):
    """What a row's samples are compared with: real images of the new classes and of the old ones."""

    net: Network
    new: Images
    old: Images
    targets: tuple[Moments, Moments]


def parse(methods: str) -> list[tuple[str, entries.Entry]]:
    """(name, entry) of --methods: names of ROWS or specifications, each with an optional @rate. Raises FlagError."""
    items = [item.strip() for item in methods.split(";" if ";" in methods or ":" in methods else ",")]
    return list(zip(items, entries.parse(";".join(ROWS.get(item, item) for item in items)), strict=True))


def table(
    task: Task,
    train_part: Images,
    test: Images,
    recipe: Recipe,
    sampling: Sampling,
    values: Any,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Trains a row after the other, or goes on; writes table.md, table.csv and sheet.png. Finished rows are kept."""
    workdir, old = Path(values.workdir).expanduser(), task.base.setting.trained
    if not task.base.config.num_classes:
        raise FlagError(f"--mode=table teaches classes, and {task.base.name} is told none: give --peft for one run.")
    if not task.new:
        raise FlagError("--classes names no class that the base has not seen: there is nothing to adapt to.")
    rows = parse(values.methods)
    net = network(values.features, test)
    parts = [evenly(of_classes(test, classes), values.table_images) for classes in (task.new, old)]
    measure = Measure(net, *parts, tuple(net.measure(part.images, part.labels)[0] for part in parts))
    if values.dry_run:
        return print(f"{len(rows)} methods, {recipe.steps} steps each: {', '.join(name for name, _ in rows)}")

    shown = np.repeat(task.new, SHOWN)
    picks = [np.flatnonzero(train_part.labels == label)[:SHOWN] for label in task.new]
    names, strips = ["real"], [train_part.images[np.concatenate(picks)]]
    run = start(task, "linear_probe", recipe, values.seed)
    variables, draw = run.state.variables(run.frozen), drawer(task.base, sampling, run.method, task.new)
    results = [{"method": "base", "trainable": 0} | measured(draw, variables, measure)]
    names, strips = [*names, "base"], [*strips, samples(draw, variables, shown)]
    for name, entry in rows:
        row, strip = one(name, entry, task, recipe, sampling, values, measure, shown, mesh)
        results.append(row)
        names, strips = [*names, name], [*strips, strip]
        print(markdown([row]).splitlines()[-1], flush=True)
    title = (
        f"{task.base.name}, which saw {len(old)} classes, learns {', '.join(test.classes[c] for c in task.new)} from "
        f"{len(task.train.labels)} images: {recipe.steps} steps of {recipe.batch_size} rows, "
        f"prior weight {values.prior:g}; Frechet distance of {len(parts[0].labels)} samples of new classes, "
        f"{len(parts[1].labels)} of old ones, by {net.name}."
    )
    write(results, workdir, title)
    write_bytes(workdir / "sheet.png", sheet(np.concatenate(strips), len(shown), names))
    print(f"{title}\n\n{markdown(results)}\nsamples: {workdir / 'sheet.png'}")


def one(
    name: str,
    entry: entries.Entry,
    task: Task,
    recipe: Recipe,
    sampling: Sampling,
    values: Any,
    measure: Measure,
    shown: np.ndarray,
    mesh: jax.sharding.Mesh | None,
) -> tuple[dict[str, Any], np.ndarray]:
    """A method's row, and its samples of the classes `shown`."""
    recipe = Recipe(**common.jsonable(recipe) | {"learning_rate": entry.rate})
    where = Path(values.workdir).expanduser() / "methods" / entry.folder
    measured_by = {"sampling": common.jsonable(sampling), "images": len(measure.new.labels), "net": measure.net.name}
    who = common.finite(identity(task, entry.spec, recipe, values.seed) | measured_by)
    run = start(task, entry.spec, recipe, values.seed, mesh)
    draw = drawer(task.base, sampling, run.method, task.new)
    if (where / "result.json").exists():
        found = common.read_json(where / "result.json", identity=dict, row=dict)
        common.refuse_other(found["identity"], who, f"{where} holds a result")
        loaded = adapters.load(where / "adapter")
        shapes = jax.eval_shape(lambda: run.state.variables(run.frozen)["head"])
        variables = adapters.attach(loaded, task.base.params, run.sites, task.base.fingerprint, False, shapes)
        return found["row"], samples(draw, variables, shown)
    print(training.summary(task.base, entry.spec, run), flush=True)
    trainable = training.counts(run)[0]
    watch = Watch(task, run, recipe, sampling, where, 0, values.features)
    state, result = train(
        task, entry.spec, recipe, values.seed, run, where, watch, mesh=mesh, label=name, save_every=values.save_every
    )
    variables = state.variables(run.frozen)
    size = save_adapter(where / "adapter", task, entry.spec, run, variables)
    row = {"method": name, "trainable": trainable, "rate": entry.rate, "seconds": result.seconds}
    row |= {"kilobytes": size / 1000} | measured(draw, variables, measure)
    common.write_json(where / "result.json", {"identity": who, "row": row})
    return row, samples(draw, variables, shown)


def samples(draw: Draw, variables: Variables, labels: np.ndarray, seed: int = 2) -> np.ndarray:
    """An image of each label."""
    return generate(draw, variables, {"labels": labels.astype(np.int32)}, len(labels), seed, BATCH)


def measured(draw: Draw, variables: Variables, measure: Measure) -> dict[str, Any]:
    """Distances and consistencies of new and of old classes."""
    found: dict[str, Any] = {}
    for name, real, target in zip(("new", "old"), (measure.new, measure.old), measure.targets, strict=True):
        images = samples(draw, variables, real.labels, seed=1)
        row = score(measure.net, name, images, real.labels, target)
        found |= {name: row["frechet"], f"{name}_consistency": row["consistency"]}
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; what a row has not is a dash."""
    lines = ["| " + " | ".join(CELLS) + " |", "|---" + "|--:" * (len(CELLS) - 1) + "|"]
    for row in rows:
        cells = ("-" if row.get(key) is None else format(row[key], spec) for key, spec in CELLS.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[dict[str, Any]], folder: Path, title: str) -> None:
    """Writes table.md and table.csv atomically."""
    text = io.StringIO()
    out = csv.DictWriter(text, [key for key, _ in CELLS.values()], lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    write_text(folder / "table.csv", text.getvalue())
    write_text(folder / "table.md", f"{title}\n\n{markdown(rows)}")
