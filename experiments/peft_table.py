"""The main job: a table of PEFT methods on one base and one set of sentences, several seeds each.

    python -m experiments.peft_table                       # quick: 60 steps of 16 short rows, and says so
    python -m experiments.peft_table --preset=published    # 300 steps of 32 rows of 48 tokens: the README's table
    python -m experiments.peft_table --smoke               # tiny model, bundled sentences, no network, under a minute
    python -m experiments.peft_table --methods='lora:rank=4@2e-3;bitfit;my_package.my_method'

Differs from `classify`, which trains one method once and keeps its adapter for use. All seeds of a method are one
compiled program: adapters, heads and optimiser states have a leading axis and the base is shared. An interrupted table
goes on where it was: finished methods are read from `methods/NAME/result.json`, a begun one resumes from its
checkpoint. Writes config.json, table.md, table.csv, table.png, and for each method result.json, metrics.jsonl,
curve.png and adapters.
"""

import json
import os
import re
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import common, table
from experiments.classification import (
    Data,
    Recipe,
    batches,
    counts,
    evaluator,
    load_data,
    predictions,
    save_adapter,
    start,
)
from research.convert.load import Pretrained, load
from research.errors import DataError, FlagError
from research.peft import registry
from research.train import checkpoint, loop, metrics, plot, state, step
from research.train.lock import lock

# Method: (specification, peak learning rate). The rates were chosen on the validation tenth (docs/experiments.md).
ROWS = {
    "full": ("full", 1e-4),
    "linear_probe": ("linear_probe", 1e-2),
    "bitfit": ("bitfit", 3e-3),
    "layernorm": ("layernorm", 3e-3),
    "prompt": ("prompt:length=20", 3e-2),
    "prefix": ("prefix:length=10,hidden=128", 3e-3),
    "ptuning_v2": ("ptuning_v2:length=10", 1e-2),
    "ia3": ("ia3", 1e-2),
    "lora": ("lora:rank=8", 2e-3),
    "pfeiffer": ("pfeiffer:width=64", 1e-3),
    "houlsby": ("houlsby:width=64", 1e-3),
}
PRESETS = {
    "quick": {"steps": 60, "batch_size": 16, "max_length": 32},
    "published": {"steps": 300, "batch_size": 32, "max_length": 48},
}
if __name__ == "__main__":
    common.model_flags("minilm-l6")
    flags.DEFINE_string("data", "vader/movie", "Packaged set, file with text and label columns, or hub id.")
    flags.DEFINE_string("methods", "all", "Names, or specifications apart by semicolons, each with an optional @rate.")
    flags.DEFINE_integer("seeds", 3, "Runs of each method.", lower_bound=1)
    flags.DEFINE_enum("preset", "quick", list(PRESETS), "Defaults of --steps, --batch_size and --max_length.")
    common.recipe_flags(steps=None, batch_size=None, max_length=None)
    flags.DEFINE_integer(
        "tune",
        0,
        "Learning rates a factor of 3 apart to try by validation accuracy of seed 0; 0 for none.",
        lower_bound=0,
    )
    flags.DEFINE_bool(
        "smoke", False, "A tiny random model on 200 bundled sentences: shows that everything works, and nothing else."
    )
    flags.DEFINE_string("workdir", "runs/peft_table", "Where everything is written.")


@dataclass(frozen=True)
class Entry:
    """One row to fill."""

    name: str
    spec: str
    rate: float


def entries(methods: str) -> list[Entry]:
    """Parses --methods. FlagError names the nearest method."""
    if methods.strip() == "all":
        return [Entry(name, spec, rate) for name, (spec, rate) in ROWS.items()]
    found = []
    for item in re.split(";" if re.search("[;:]", methods) else ",", methods):
        spec, _, rate = item.strip().partition("@")
        known = ROWS.get(spec, (spec, 1e-3))
        registry.parse(known[0])
        try:
            found.append(Entry(spec, known[0], float(rate) if rate else known[1]))
        except ValueError:
            raise FlagError(f"--methods: {rate!r} is no learning rate. Valid: {spec}@1e-3.") from None
    if len({e.name for e in found}) < len(found):
        raise FlagError("--methods names a method twice.")
    return found


def main() -> None:
    values = flags.FLAGS
    preset = PRESETS[values.preset] | ({"steps": 20, "batch_size": 16, "max_length": 16} if values.smoke else {})
    for name, default in preset.items():
        values[name].value = default if values[name].value is None else values[name].value
    todo = entries(values.methods)
    if values.smoke:  # nothing here is worth an optimising compiler's time; XLA reads this when its backend starts
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    model, source = ("smoke", "smoke") if values.smoke else (values.model, values.data)
    recipe = Recipe(
        learning_rate=0.0, **common.flag_values(*(f for f in Recipe.__dataclass_fields__ if f != "learning_rate"))
    )
    workdir = common.start_workdir(
        values.workdir + ("-smoke" if values.smoke and values["workdir"].using_default_value else "")
    )
    with lock(workdir):
        base = load(model, dtype=values.dtype, remat=values.remat)
        data = load_data(source, base.tokenizer, recipe.max_length)
        sizes = ", ".join(f"{len(getattr(data, part)['labels'])} {part}" for part in ("train", "validation", "test"))
        print(f"{model} on {source}: {sizes} sentences, {len(data.class_names)} classes")
        heading = title(model, source, recipe, values.seeds, values.smoke, len(data.test["labels"]))
        rows = []
        for place, entry in enumerate(todo, 1):
            print(f"[{place}/{len(todo)}] {entry.name}", flush=True)
            rows.append(
                row(entry, base, data, recipe, values.seeds, values.tune, workdir / "methods" / folder(entry.name))
            )
            table.write(rows, workdir, heading)
    print((workdir / "table.md").read_text())
    print(f"table.md, table.csv and table.png are in {workdir}")


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


def folder(name: str) -> str:
    """A file name for a specification."""
    return re.sub(r"[^\w.=+-]+", "_", name)


def row(
    entry: Entry, base: Pretrained, data: Data, recipe: Recipe, seeds: int, tune: int, where: Path
) -> dict[str, Any]:
    """One method's row: read from its folder if it is finished, else trained."""
    identity = {"spec": entry.spec, "rate": entry.rate, "tune": tune, "seeds": seeds, "dtype": base.config.dtype}
    identity |= {"base": base.fingerprint, "data": data.fingerprint, "recipe": common.jsonable(recipe)}
    done = read_result(where / "result.json")
    if done.get("identity") == identity:
        print(f"  finished before: accuracy {100 * done['row']['accuracy']:.1f}")
        return done["row"]
    if done:
        shutil.rmtree(where)  # of other settings: nothing of it can be gone on with
    rate = entry.rate if not tune else tuned(entry, base, data, recipe, tune, where / "tune")
    result = train(replace(entry, rate=rate), base, data, recipe, list(range(seeds)), where, identity)
    common.write_json(where / "result.json", {"identity": identity, "row": result})
    shutil.rmtree(where / "checkpoints", ignore_errors=True)
    return result


def read_result(path: Path) -> dict[str, Any]:
    """A finished row, or {}."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): delete it to compute this row again.") from None


def tuned(entry: Entry, base: Pretrained, data: Data, recipe: Recipe, tries: int, where: Path) -> float:
    """The rate with the best validation accuracy of seed 0 among `tries` rates a factor of 3 apart around the entry's
    own.
    """
    scores = {}
    for i in range(tries):
        rate = float(f"{entry.rate * 3.0 ** (i - tries // 2):.1e}")
        run = start(base, entry.spec, len(data.class_names), replace(recipe, learning_rate=rate), 0)
        path = where / f"{rate:g}.json"
        scores[rate] = read_result(path).get("accuracy")
        if scores[rate] is None:
            result, _ = fit(run, data, replace(recipe, learning_rate=rate), 0, f"{entry.name} at {rate:g}")
            scores[rate] = evaluator(run, data.validation)(result.state)["accuracy"]
            path.parent.mkdir(parents=True, exist_ok=True)
            common.write_json(path, {"rate": rate, "accuracy": scores[rate]})
        print(f"  rate {rate:g}: validation accuracy {100 * scores[rate]:.2f}", flush=True)
    return max(scores, key=scores.get)


def fit(
    run: Any,
    data: Data,
    recipe: Recipe,
    seeds: Any,
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


def train(
    entry: Entry, base: Pretrained, data: Data, recipe: Recipe, seeds: list[int], where: Path, identity: dict
) -> dict[str, Any]:
    """Trains all seeds of a method in one program, evaluates them on the test part and saves each one's adapter."""
    recipe = replace(recipe, learning_rate=entry.rate)
    run = start(base, entry.spec, len(data.class_names), recipe, seeds)
    trainable, total = counts(run)
    result, memory = fit(run, data, recipe, seeds, entry.name, where, identity)
    found = predictions(run, result.state, data.test)
    accuracy = [float(x) for x in np.mean(found == data.test["labels"], axis=1)]
    size = []
    for i, seed in enumerate(seeds):
        one, more = state.take(result.state, i), {"seed": seed, "accuracy": accuracy[i]}
        size.append(save_adapter(where / f"adapter-{seed}", base, entry.spec, run, one, data, recipe, **more))
    plot.curve(where / "metrics.jsonl", where / "curve.png")
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
    common.run(main)
