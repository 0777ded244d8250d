"""The vision table: methods x tasks on one base, the seeds of a cell in one program, each method at a rate of its own.

    WORKDIR/tasks/TASK/METHOD/result.json ...   a finished cell; the same command goes on with what is missing
    WORKDIR/tasks/TASK/table.md, .csv, .png     one task, in the form of `peft_table`
    WORKDIR/table.md, .csv, .png                all tasks, with the mean of each group and the mean of those means

The tasks are those of `vtab.py`. With --tune a rate is chosen on 800 / 200 of a task's 1,000 training rows, as VTAB
does, and the row then trains on all of them; the test part is looked at once.
"""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import augmenting, cell, common, entries, images, table, training, vtab
from experiments.shared.entries import Entry
from experiments.shared.images import Recipe
from experiments.shared.table import Row
from experiments.shared.vit_base import VitBase
from research.data.images import Images, split
from research.files import write_text
from research.train import loop, plot, state

# Starting points for a small base; --tune tries their neighbours.
METHODS = (
    "full@5e-4;linear_probe@2e-2;bitfit@5e-3;layernorm@5e-3;vpt:length=10,deep=False@1e-2;vpt:length=10@1e-2;"
    "adaptformer:width=16@5e-3;pfeiffer:width=16@3e-3;lora:rank=4@5e-3"
)
SMOKE_METHODS = "linear_probe@3e-2;lora:rank=2@1e-2;vpt:length=2@1e-2"

Cells = dict[tuple[str, str], Row]


def fill(
    base: VitBase, todo: Sequence[Entry], tasks: Sequence[str], recipe: Recipe, same: dict[str, Any], workdir: Path
) -> list[Row]:
    """Trains the cells that are missing and writes the tables after each. Returns the rows of the whole table.

    same: what all cells have in common and a result must agree with: seeds, tune, augment, dtype, base.
    """
    parts, places, identities = {}, {}, {}
    for task in tasks:
        parts[task] = vtab.load(task, base.config)
        data = images.fingerprint(*parts[task])
        if seen := [name for name in parts[task][0].classes if name in base.classes]:
            print(f"{task}: the base was trained on {', '.join(seen)} too")
        for entry in todo:
            places[task, entry] = workdir / "tasks" / task / entry.folder
            mine = {"task": task, "spec": entry.spec, "rate": entry.rate, "data": data}
            identities[task, entry] = mine | same | {"recipe": common.jsonable(recipe)}
            entries.finished(places[task, entry], identities[task, entry])  # all are asked before one trains
    common.write_config(workdir)
    cells: Cells = {}
    names = [entry.name for entry in todo]
    for entry in todo:
        for task in tasks:
            print(f"[{len(cells) + 1}/{len(tasks) * len(todo)}] {entry.name} on {task}", flush=True)
            place, identity = places[task, entry], identities[task, entry]
            cells[task, entry.name] = one(entry, base, parts[task], recipe, identity, place)
            write(names, tasks, cells, workdir, title(base, recipe, same))
    for task in tasks:
        heading = f"{task}: {vtab.TASKS[task].metric} on {len(parts[task][1].labels)} images"
        table.write([cells[task, name] for name in names], workdir / "tasks" / task, heading)
    return rows(names, tasks, cells)


def title(base: VitBase, recipe: Recipe, same: dict[str, Any]) -> str:
    """What the table was measured on."""
    smoke = " Smoke test: the numbers mean nothing." if base.name == "smoke" else ""
    return (
        f"{base.name} adapted with at most {vtab.TRAIN:,} images a task: test accuracy in %, {same['seeds']} seed(s), "
        f"{recipe.steps} steps of {recipe.batch_size} images, {os.cpu_count()} cores.{smoke}"
    )


def one(
    entry: Entry, base: VitBase, parts: tuple[Images, Images], recipe: Recipe, identity: dict[str, Any], where: Path
) -> Row:
    """One method on one task: read from its folder if it is finished, else trained."""

    def score(rate: float) -> float:
        part, held = split(parts[0], 0.2)
        run, result, _ = fit(entry, base, part, replace(recipe, learning_rate=rate), 0, identity["augment"])
        return training.evaluator(run, images.arrays(held))(result.state)["accuracy"]

    return cell.fill(entry, identity, where, score, lambda tuned: train(tuned, base, parts, recipe, identity, where))


def train(
    entry: Entry, base: VitBase, parts: tuple[Images, Images], recipe: Recipe, identity: dict[str, Any], where: Path
) -> Row:
    """Trains all seeds in one program, evaluates them on the test part and saves each one's adapter."""
    (learn, test), seeds = parts, list(range(identity["seeds"]))
    recipe = replace(recipe, learning_rate=entry.rate)
    run, result, memory = fit(entry, base, learn, recipe, seeds, identity["augment"], where, identity)
    predict = images.predictor(base, run.method, run.sites)
    accuracy, size = [], []
    for i, seed in enumerate(seeds):
        mine = state.take(result.state, i)
        accuracy.append(float(np.mean(predict(mine.variables(run.frozen), test) == test.labels)))
        more = {"seed": seed, "accuracy": accuracy[-1], "data": identity["task"]}
        size.append(images.save_adapter(where / f"adapter-{seed}", base, entry.spec, run, mine, test.classes, **more))
    return cell.row(entry, run, result, memory, accuracy, size[0])


def fit(
    entry: Entry, base: VitBase, learn: Images, recipe: Recipe, seeds: int | list[int], augment: str, *kept: Any
) -> tuple[training.Run, loop.Result, dict[str, int]]:
    """The run, what came of it, and the memory of its step. `kept`: where, and the identity, of a run that is kept."""
    run = images.start(base, entry.spec, learn, recipe, seeds, augmenting.parse(augment))
    return run, *cell.fit(run, images.batches(learn, recipe, seeds), recipe.steps, entry.name, *kept)


# --------------------------------------------------------------------------------------------------------------- tables


def rows(methods: Sequence[str], tasks: Sequence[str], cells: Cells) -> list[Row]:
    """One row a method that has all its cells: means of the tasks, of each group, and of the groups' means, over seeds.

    `accuracy` and `std` are of that last mean, which weighs groups and not tasks alike (VTAB, section 2).
    """
    found = []
    for method in methods:
        mine = {task: cells[task, method] for task in tasks if (task, method) in cells}
        if len(mine) < len(tasks):
            continue
        first, groups = next(iter(mine.values())), {}
        for group in vtab.GROUPS:
            of = [np.asarray(x["accuracies"]) for task, x in mine.items() if vtab.TASKS[task].group == group]
            if of:
                groups[group] = np.mean(of, axis=0)
        mean = np.mean(list(groups.values()), axis=0)
        found.append({
            "method": method, "trainable": first["trainable"], "percent": first["percent"],
            "tasks": {task: x["accuracy"] for task, x in mine.items()},
            "groups": {group: float(x.mean()) for group, x in groups.items()},
            "accuracy": float(mean.mean()), "std": float(mean.std(ddof=1)) if mean.size > 1 else 0.0,
        })  # fmt: skip
    return found


def markdown(found: Sequence[Row], tasks: Sequence[str]) -> str:
    """The table: tasks by group, each group's mean behind them, all in per cent."""
    columns: list[tuple[str, Any]] = []
    for group in vtab.GROUPS:
        own = [task for task in tasks if vtab.TASKS[task].group == group]
        columns += [(task, lambda r, task=task: r["tasks"][task]) for task in own]
        columns += [(f"**{group}**", lambda r, group=group: r["groups"][group])] if own else []
    heads = ["method", "trainable", "%", *(name for name, _ in columns), "**mean**"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for r in found:
        cells = [r["method"], f"{r['trainable']:,}", f"{r['percent']:.3f}"]
        cells += [f"{100 * value(r):.1f}" for _, value in columns]
        lines.append("| " + " | ".join([*cells, f"{100 * r['accuracy']:.1f} ± {100 * r['std']:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def write(methods: Sequence[str], tasks: Sequence[str], cells: Cells, workdir: Path, heading: str) -> None:
    """Writes table.csv, a line a cell, and of the methods that have all cells table.md and table.png; atomically."""
    text = io.StringIO()
    lines = csv.DictWriter(text, ["task", "group", *table.COLUMNS], extrasaction="ignore", lineterminator="\n")
    lines.writeheader()
    for task in tasks:
        mine = [cells[task, method] for method in methods if (task, method) in cells]
        lines.writerows({"task": task, "group": vtab.TASKS[task].group} | row for row in mine)
    write_text(workdir / "table.csv", text.getvalue())
    if found := rows(methods, tasks, cells):
        write_text(workdir / "table.md", f"{heading}\n\n{markdown(found, tasks)}")
        points = [
            r | {k: 100 * r[k] for k in ("accuracy", "std")} | {"trainable": max(1, r["trainable"])} for r in found
        ]
        plot.scatter(points, workdir / "table.png", y="accuracy", title=heading.split(":")[0])
