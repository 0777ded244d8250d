"""One cell of a table of methods: all seeds in one program, at the rate that tuning chose, read again once finished.

WHERE/result.json    {"identity", "row"}: what it was made with, and the row
WHERE/tune/RATE.json a trial of seed 0
WHERE/metrics.jsonl, curve.png, adapter-SEED, and checkpoints while it trains
"""

import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.shared import common, entries, training
from experiments.shared.entries import Entry
from experiments.shared.table import Row
from research.errors import ModelError
from research.train import checkpoint, loop, metrics, plot, step

Identity = dict[str, Any]
Score = Callable[[float], float]  # rate -> validation accuracy of seed 0


def fill(entry: Entry, identity: Identity, where: Path, score: Score, train: Callable[[Entry], Row]) -> Row:
    """The row: read from its folder if it is finished, else trained, with a tuned rate where identity["tune"]."""
    if done := entries.finished(where, identity):
        print(f"  finished before: accuracy {100 * done['row']['accuracy']:.1f}")
        return done["row"]
    if identity["tune"]:
        own = {key: value for key, value in identity.items() if key not in ("seeds", "tune", "rate")}
        entry = replace(entry, rate=tuned(entry.rate, identity["tune"], own, where / "tune", score))
    row = common.finite(train(entry))
    common.write_json(where / "result.json", {"identity": identity, "row": row})
    shutil.rmtree(where / "checkpoints", ignore_errors=True)
    plot.curve(where / "metrics.jsonl", where / "curve.png")
    return row


def tuned(rate: float, tries: int, identity: Identity, where: Path, score: Score) -> float:
    """The rate with the best score among `tries`, a factor of 3 apart, around the given one. A trial is kept with its
    identity and not made again. A rate at which training diverges is the worst.
    """
    scores = {}
    for i in range(tries):
        tried = float(f"{rate * 3.0 ** (i - tries // 2):.1e}")
        path = where / f"{tried:g}.json"
        found = common.read_json(path, identity=dict, accuracy=float) if path.exists() else {}
        if found.get("identity") != identity:
            try:
                found = {"accuracy": score(tried)}
            except ModelError as error:  # nothing is saved here, so it is the loss that is not finite
                print(f"  {error}")
                found = {"accuracy": 0.0, "diverged": True}
            common.write_json(path, {"identity": identity} | found)
        scores[tried] = found["accuracy"]
        print(f"  rate {tried:g}: validation accuracy {100 * scores[tried]:.2f}", flush=True)
    return max(scores, key=scores.get)


def fit(
    run: training.Run,
    batch: Callable,
    steps: int,
    label: str,
    where: Path | None = None,
    identity: Identity | None = None,
) -> tuple[loop.Result, dict[str, int]]:
    """Trains, and says how many bytes the step takes. With `where` it writes metrics and checkpoints, and resumes."""
    compiled = training.compile_step(run, batch)[0]
    kept = {}
    if where is not None:
        kept = {
            "checkpointer": checkpoint.Checkpointer(where / "checkpoints", keep=1),
            "save_every": max(20, steps // 3),
            "identity": identity,
            "writer": metrics.Writer(where / "metrics.jsonl"),
            "log_every": max(1, steps // 60),
        }
    result = loop.fit(compiled, run.state, run.frozen, batch, steps=steps, label=label, **kept)
    return result, step.memory(compiled)


def row(
    entry: Entry, run: training.Run, result: loop.Result, memory: dict[str, int], accuracy: Sequence[float], size: int
) -> Row:
    """The columns of every table. accuracy: of each seed; size: bytes of an adapter."""
    trainable, total = training.counts(run)
    print(f"  accuracy {100 * statistics.mean(accuracy):.1f}", flush=True)
    return {
        "method": entry.name,
        "trainable": trainable,
        "percent": 100 * trainable / total,
        "accuracy": statistics.mean(accuracy),
        "std": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
        "accuracies": list(accuracy),
        "rate": entry.rate,
        "train_s": result.seconds / len(accuracy),
        "step_ms": result.step_ms / len(accuracy),
        "step_mb": memory["peak"] / 2**20,
        "adapter_kb": size / 2**10,
    }
