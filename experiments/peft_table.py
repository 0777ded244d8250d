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
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.shared import common, entries, table, training
from experiments.shared.classification import (
    Data,
    Recipe,
    Run,
    batches,
    load_data,
    predictions,
    save_adapter,
    start,
)
from experiments.shared.entries import Entry
from experiments.shared.table import Row
from experiments.shared.training import counts, evaluator, load_base
from research.convert.load import Pretrained
from research.errors import FlagError, ModelError
from research.train import checkpoint, loop, metrics, plot, state, step
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
        base = load_base(model, values.quantise, dtype=values.dtype, remat=values.remat, untie=values.untie)
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
    if done := entries.finished(where, identity):
        print(f"  finished before: accuracy {100 * done['row']['accuracy']:.1f}")
        if retime:
            done["row"] |= common.finite(timing(entry, base, data, recipe, seeds))
            common.write_json(where / "result.json", done | {"retimed": True})
        return done["row"]
    if identity["tune"]:
        entry = replace(entry, rate=tuned(entry, base, data, recipe, identity, where / "tune"))
    result = common.finite(train(entry, base, data, recipe, seeds, where, identity))
    common.write_json(where / "result.json", {"identity": identity, "row": result})
    shutil.rmtree(where / "checkpoints", ignore_errors=True)
    plot.curve(where / "metrics.jsonl", where / "curve.png")
    return result


def tuned(entry: Entry, base: Pretrained, data: Data, recipe: Recipe, identity: dict[str, Any], where: Path) -> float:
    """The rate with the best validation accuracy of seed 0 among `tune` rates a factor of 3 apart around the entry's
    own. One at which training diverges is the worst.
    """
    scores, tries = {}, identity["tune"]
    for i in range(tries):
        rate = float(f"{entry.rate * 3.0 ** (i - tries // 2):.1e}")
        trial, path = replace(recipe, learning_rate=rate), where / f"{rate:g}.json"
        mine = {k: identity[k] for k in ("spec", "base", "data", "dtype")} | {
            "seed": 0,
            "recipe": common.jsonable(trial),
        }
        found = common.read_json(path, identity=dict, accuracy=float) if path.exists() else {}
        if found.get("identity") != mine:
            run = start(base, entry.spec, len(data.class_names), data.train, trial, 0)
            try:
                result, _ = fit(run, data, trial, 0, f"{entry.name} at {rate:g}")
                found = {"accuracy": evaluator(run, data.validation)(result.state)["accuracy"]}
            except ModelError as error:  # nothing is saved here, so it is the loss that is not finite
                print(f"  {error}")
                found = {"accuracy": 0.0, "diverged": True}
            common.write_json(path, {"identity": mine} | found)
        scores[rate] = found["accuracy"]
        print(f"  rate {rate:g}: validation accuracy {100 * scores[rate]:.2f}", flush=True)
    return max(scores, key=scores.get)


def fit(
    run: Run,
    data: Data,
    recipe: Recipe,
    seeds: int | list[int],
    label: str,
    where: Path | None = None,
    identity: dict | None = None,
) -> tuple[loop.Result, dict[str, int]]:
    """Trains, and says how many bytes the step takes. With `where` it writes metrics and checkpoints, and resumes."""
    batch = batches(data.train, recipe, seeds)
    compiled = step.compile(run.step, run.state, run.frozen, batch(0))
    kept = {}
    if where is not None:
        kept = {
            "checkpointer": checkpoint.Checkpointer(where / "checkpoints", keep=1),
            "save_every": max(20, recipe.steps // 3),
            "identity": identity,
            "writer": metrics.Writer(where / "metrics.jsonl"),
            "log_every": max(1, recipe.steps // 60),
        }
    result = loop.fit(compiled, run.state, run.frozen, batch, steps=recipe.steps, label=label, **kept)
    return result, step.memory(compiled)


def timing(entry: Entry, base: Pretrained, data: Data, recipe: Recipe, seeds: list[int], steps: int = 12) -> Row:
    """The timing columns from a dozen steps."""
    short = replace(recipe, steps=steps, learning_rate=entry.rate)
    run = start(base, entry.spec, len(data.class_names), data.train, short, seeds)
    result, _ = fit(run, data, short, seeds, f"{entry.name}, timing")
    return {"step_ms": result.step_ms / len(seeds), "train_s": recipe.steps * result.step_ms / 1000 / len(seeds)}


def train(
    entry: Entry, base: Pretrained, data: Data, recipe: Recipe, seeds: list[int], where: Path, identity: dict
) -> Row:
    """Trains all seeds of a method in one program, evaluates them on the test part and saves each one's adapter."""
    recipe = replace(recipe, learning_rate=entry.rate)
    run = start(base, entry.spec, len(data.class_names), data.train, recipe, seeds)
    trainable, total = counts(run)
    result, memory = fit(run, data, recipe, seeds, entry.name, where, identity)
    found = predictions(base, run, result.state, data.test)
    accuracy = [float(x) for x in np.mean(found == data.test["labels"], axis=1)]
    size = []
    for i, seed in enumerate(seeds):
        one, more = state.take(result.state, i), {"seed": seed, "accuracy": accuracy[i]}
        size.append(save_adapter(where / f"adapter-{seed}", base, entry.spec, run, one, data, recipe, **more))
    print(f"  accuracy {100 * statistics.mean(accuracy):.1f}", flush=True)
    return {
        "method": entry.name,
        "trainable": trainable,
        "percent": 100 * trainable / total,
        "accuracy": statistics.mean(accuracy),
        "std": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
        "accuracies": accuracy,
        "predictions": ["".join(map(str, row)) if len(data.class_names) <= 10 else row.tolist() for row in found],
        "rate": entry.rate,
        "train_s": result.seconds / len(seeds),
        "step_ms": result.step_ms / len(seeds),
        "step_mb": memory["peak"] / 2**20,
        "adapter_kb": size[0] / 2**10,
    }


if __name__ == "__main__":
    define_flags()
    common.run(main)
