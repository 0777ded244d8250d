"""The main job: a table of PEFT methods on one base and one set of sentences, several seeds each.

    python -m experiments.peft_table                       # quick: 60 steps of 16 short rows, and says so
    python -m experiments.peft_table --preset=published    # 300 steps of 32 rows of 48 tokens: the README's table
    python -m experiments.peft_table --smoke               # tiny model, bundled sentences, no network, under a minute
    python -m experiments.peft_table --methods='lora:rank=4@2e-3;bitfit;my_package.my_method'

Differs from `classify`, which trains one method once and keeps its adapter for use. All seeds of a method are one
compiled program: adapters, heads and optimiser states have a leading axis and the base is shared. An interrupted table
goes on where it was: finished methods are read from `methods/NAME/result.json`, a begun one resumes from its
checkpoint, and other settings need another --workdir. Writes config.json, table.md, table.csv, table.png, and for each
method result.json, metrics.jsonl, curve.png and adapters.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.shared import cell, common, entries, table, training
from experiments.shared.classification import (
    Data,
    Recipe,
    batches,
    load_data,
    predictions,
    save_adapter,
    start,
)
from experiments.shared.entries import Entry
from experiments.shared.table import Row
from experiments.shared.training import evaluator, load_base
from research.convert.load import Pretrained
from research.errors import FlagError
from research.train import loop, state
from research.train.lock import lock

PRESETS = {
    "quick": {"steps": 60, "batch_size": 16, "max_length": 32},
    "published": {"steps": 300, "batch_size": 32, "max_length": 48},
}
SMOKE = {"steps": 20, "batch_size": 16, "max_length": 16}


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags("minilm-l6")
    flags.DEFINE_string("data", "vader/movie", "Packaged set, file with text and label columns, or hub id.")
    flags.DEFINE_string(
        "methods", entries.NINE, "Names, 'all', or specifications apart by semicolons; each with @rate."
    )
    flags.DEFINE_integer("seeds", 3, "Runs of each method.", lower_bound=1)
    flags.DEFINE_enum("preset", "quick", list(PRESETS), "Defaults of --steps, --batch_size and --max_length.")
    training.recipe_flags(steps=None, batch_size=None)
    flags.DEFINE_integer("max_length", None, "Tokens a row is cut to.", lower_bound=3)
    flags.DEFINE_integer(
        "tune",
        0,
        "Learning rates a factor of 3 apart to try by validation accuracy of seed 0; 0 for none.",
        lower_bound=0,
    )
    flags.DEFINE_bool("retime", False, "Time the steps of finished methods again, where the machine was busy before.")
    flags.DEFINE_bool(
        "smoke", False, "A tiny random model on 200 bundled sentences: shows that everything works, and nothing else."
    )
    flags.DEFINE_string(
        "workdir", None, "Where everything is written. Default: runs/peft_table, -published or -smoke added for those."
    )


def main() -> None:
    values = flags.FLAGS
    model, source, recipe, workdir = settings(values)
    todo = entries.parse(values.methods, small=values.smoke)
    if values.smoke:  # nothing here is worth an optimising compiler's time; XLA reads this when its backend starts
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    with lock(workdir):
        base = load_base(model, values.quantise, **common.model_options())
        todo = entries.applicable(todo, base, recipe.max_length, skip=values.methods.strip() == "all")
        data = load_data(source, base.tokenizer, recipe.max_length)
        sizes = ", ".join(f"{len(getattr(data, part)['labels'])} {part}" for part in ("train", "validation", "test"))
        print(f"{model} on {source}: {sizes} sentences, {len(data.class_names)} classes")
        heading = title(model, source, recipe, values.seeds, values.smoke, len(data.test["labels"]))
        same = {"tune": values.tune, "seeds": values.seeds, "dtype": base.config.dtype, "base": base.fingerprint}
        same |= {} if values.quantise is None else {"quantise": values.quantise}
        same |= {"data": data.fingerprint, "recipe": common.jsonable(recipe)}
        places = {e: workdir / "methods" / e.folder for e in todo}
        identities = {e: {"spec": e.spec, "rate": e.rate} | same for e in todo}
        for entry in todo:
            entries.finished(places[entry], identities[entry])  # all are asked before one trains
        common.write_config(workdir)
        rows = []
        for place, entry in enumerate(todo, 1):
            print(f"[{place}/{len(todo)}] {entry.name}", flush=True)
            rows.append(row(entry, base, data, recipe, identities[entry], values.retime, places[entry]))
            table.write(rows, workdir, heading)
    print((workdir / "table.md").read_text(encoding="utf-8"))
    print(f"table.md, table.csv and table.png are in {workdir}")


def settings(values: Any) -> tuple[str, str, Recipe, Path]:
    """Model, data, recipe without a rate, and folder, of the flags and what --preset and --smoke put in their place."""
    own = [name for name in ("model", "data") if not values[name].using_default_value]
    if values.smoke and own:
        raise FlagError(f"--smoke has its own model and sentences: leave out --{own[0]}.")
    defaults = SMOKE if values.smoke else PRESETS[values.preset]
    given = common.flag_values(*(f for f in Recipe.__dataclass_fields__ if f != "learning_rate"))
    recipe = Recipe(learning_rate=0.0, **{k: defaults.get(k) if v is None else v for k, v in given.items()})
    kind = "-smoke" if values.smoke else "" if values.preset == "quick" else f"-{values.preset}"
    workdir = Path(f"runs/peft_table{kind}" if values.workdir is None else values.workdir).expanduser()
    return *(("smoke", "smoke") if values.smoke else (values.model, values.data)), recipe, workdir


def title(model: str, source: str, recipe: Recipe, seeds: int, smoke: bool, sentences: int) -> str:
    """What the table was measured on, and what it is good for."""
    text = (
        f"{model} on {source}: accuracy on {sentences} test sentences, {seeds} seed(s), {recipe.steps} steps of "
        f"{recipe.batch_size} rows of at most {recipe.max_length} tokens, {os.cpu_count()} cores."
    )
    if smoke:
        return f"{text} Smoke test: the numbers mean nothing."
    quick = " Quick table: too short a training to compare methods by; --preset=published is for that."
    return text + (quick if recipe.steps < 200 else "")


def row(
    entry: Entry, base: Pretrained, data: Data, recipe: Recipe, identity: dict[str, Any], retime: bool, where: Path
) -> Row:
    """One method's row: read from its folder if it is finished, else trained."""
    seeds = list(range(identity["seeds"]))

    def score(rate: float) -> float:
        run, result, _ = fit(entry, base, data, replace(recipe, learning_rate=rate), 0)
        return evaluator(run, data.validation)(result.state)["accuracy"]

    before = entries.finished(where, identity) if retime else None
    found = cell.fill(
        entry, identity, where, score, lambda tuned: train(tuned, base, data, recipe, seeds, where, identity)
    )
    if before:
        found |= common.finite(timing(entry, base, data, recipe, seeds))
        common.write_json(where / "result.json", before | {"row": found, "retimed": True})
    return found


def fit(
    entry: Entry, base: Pretrained, data: Data, recipe: Recipe, seeds: int | list[int], *kept: Any
) -> tuple[training.Run, loop.Result, dict[str, int]]:
    """The run, what came of it, and the memory of its step. `kept`: where, and the identity, of a run that is kept."""
    run = start(base, entry.spec, len(data.class_names), data.train, recipe, seeds)
    label = f"{entry.name} at {recipe.learning_rate:g}"
    return run, *cell.fit(run, batches(data.train, recipe, seeds), recipe.steps, label, *kept)


def timing(entry: Entry, base: Pretrained, data: Data, recipe: Recipe, seeds: list[int], steps: int = 12) -> Row:
    """The timing columns from a dozen steps."""
    _, result, _ = fit(entry, base, data, replace(recipe, steps=steps, learning_rate=entry.rate), seeds)
    return {"step_ms": result.step_ms / len(seeds), "train_s": recipe.steps * result.step_ms / 1000 / len(seeds)}


def train(
    entry: Entry, base: Pretrained, data: Data, recipe: Recipe, seeds: list[int], where: Path, identity: dict[str, Any]
) -> Row:
    """Trains all seeds of a method in one program, evaluates them on the test part and saves each one's adapter."""
    recipe = replace(recipe, learning_rate=entry.rate)
    run, result, memory = fit(entry, base, data, recipe, seeds, where, identity)
    found = predictions(base, run, result.state, data.test)
    accuracy = [float(x) for x in np.mean(found == data.test["labels"], axis=1)]
    size = []
    for i, seed in enumerate(seeds):
        one, more = state.take(result.state, i), {"seed": seed, "accuracy": accuracy[i]}
        size.append(save_adapter(where / f"adapter-{seed}", base, entry.spec, run, one, data, recipe, **more))
    said = ["".join(map(str, row)) if len(data.class_names) <= 10 else row.tolist() for row in found]
    return cell.row(entry, run, result, memory, accuracy, size[0]) | {"predictions": said}


if __name__ == "__main__":
    define_flags()
    common.run(main)
