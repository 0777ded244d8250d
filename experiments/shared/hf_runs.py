"""The bookkeeping of `hf_reference`, which needs neither torch nor jax: which run is next, the summary, the files."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.shared import common
from research.errors import DataError, FlagError
from research.files import write_text

COLUMNS = ("method", "learning_rate", "tried", "seeds", "accuracies", "mean", "std", "validation", "trainable", "head")
COLUMNS += (
    "seconds_per_step",
    "steps",
    "batch_size",
    "max_length",
    "threads",
    "python",
    "torch",
    "peft",
    "transformers",
)
RUN = ("method", "learning_rate", "seed", "validation", "test")  # what is read of a run made before


def best_rate(runs: Sequence[Mapping], method: str, rates: Sequence[float], seed: int) -> float | None:
    """Returns the rate of `seed`'s run with the best validation accuracy (the lower rate of equals).

    None while a rate has not been tried. A single rate needs no trial.
    """
    if len(rates) == 1:
        return rates[0]
    tried = {r["learning_rate"]: r["validation"] for r in runs if r["method"] == method and r["seed"] == seed}
    if any(rate not in tried for rate in rates):
        return None
    return max(sorted(rates), key=lambda rate: tried[rate])


def missing(
    runs: Sequence[Mapping], method: str, rates: Sequence[float], seeds: Sequence[int]
) -> tuple[float, int] | None:
    """Returns the next (rate, seed) to run for a method, or None when it is complete."""
    done = {(r["learning_rate"], r["seed"]) for r in runs if r["method"] == method}
    rate = best_rate(runs, method, rates, seeds[0])
    wanted = [(each, seeds[0]) for each in rates] if rate is None else [(rate, seed) for seed in seeds]
    return next((pair for pair in wanted if pair not in done), None)


def summary(runs: Sequence[Mapping], rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[dict]:
    """Returns a row for every method that has test accuracies at its chosen rate. std is the sample's (n - 1)."""
    rows = []
    for method, tried in rates.items():
        rate = best_rate(runs, method, tried, seeds[0])
        chosen = [r for r in runs if r["method"] == method and r["learning_rate"] == rate and r["seed"] in seeds]
        if not chosen:
            continue
        accuracies = [r["test"] for r in chosen]
        rows.append(
            {
                "method": method,
                "learning_rate": rate,
                "tried": " ".join(f"{each:g}" for each in tried),
                "seeds": " ".join(str(r["seed"]) for r in chosen),
                "accuracies": " ".join(f"{each:.4f}" for each in accuracies),
                "mean": round(statistics.mean(accuracies), 4),
                "std": round(statistics.stdev(accuracies), 4) if len(accuracies) > 1 else "",
                "validation": round(statistics.mean(r["validation"] for r in chosen), 4),
                "trainable": chosen[0]["trainable"],
                "head": chosen[0]["head"],
                "seconds_per_step": round(statistics.median(r["seconds_per_step"] for r in chosen), 3),
            }
        )
    return rows


def save(workdir: Path, settings: Mapping, runs: Sequence[Mapping], rows: Sequence[Mapping]) -> None:
    """Writes results.json and results.csv, each atomically."""
    common.write_json(workdir / "results.json", {"settings": settings, "summary": rows, "runs": runs})
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**settings, **settings["versions"], **row} for row in rows)
    write_text(workdir / "results.csv", table.getvalue())


def resume(workdir: Path, settings: Mapping) -> tuple[list[dict], list[dict]]:
    """Returns runs and summary of an earlier call, if any. Raises FlagError when they were made with other settings."""
    path = workdir / "results.json"
    if not path.is_file():
        return [], []
    found = common.read_json(path, settings=dict, runs=list, summary=list)
    for keys, records in ((RUN, found["runs"]), (("method",), found["summary"])):
        if bad := [x for x in records if not isinstance(x, dict) or not set(keys) <= set(x)]:
            raise DataError(f"{path} is damaged: {str(bad[0])[:40]!r} is no run.")
    common.refuse_other({k: found["settings"].get(k) for k in settings}, dict(settings), f"{path} holds runs")
    return found["runs"], found["summary"]


def complete(
    workdir: Path,
    settings: Mapping,
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    make: Callable[[str, float, int], dict],
) -> None:
    """Makes the runs that results.json lacks, `make(method, rate, seed)`, and saves after each.

    `rates` names the methods; the summary of others made before stays.
    """
    runs, before = resume(workdir, settings)
    kept = [row for row in before if row["method"] not in rates]
    for method in rates:
        while pair := missing(runs, method, rates[method], seeds):
            record = make(method, *pair)
            runs.append(record)
            save(workdir, settings, runs, kept + summary(runs, rates, seeds))
            print(
                f"{method} rate {pair[0]:g} seed {pair[1]}: validation {record['validation']:.4f}, "
                f"test {record['test']:.4f}, {record['seconds_per_step']:.3f} s/step, {record['seconds']:.0f} s",
                flush=True,
            )
    rows = summary(runs, rates, seeds)
    save(workdir, settings, runs, kept + rows)
    for row in rows:
        accuracy = f"{row['mean']} ± {row['std'] or '-'} ({row['accuracies']})"
        print(f"{row['method']}: test {accuracy} at rate {row['learning_rate']:g}")


def numbers(name: str, values: Sequence[str], kind: type) -> list:
    """Parses a flag's list. Raises FlagError for what is no finite number of `kind`, 0 or more, or occurs twice."""
    try:
        found = [kind(value) for value in values]
    except ValueError as error:
        raise FlagError(f"--{name}: {error}") from error
    if any(not 0 <= value < math.inf for value in found) or len(set(found)) < len(found):
        raise FlagError(f"--{name}={','.join(values)}: expected distinct finite numbers, 0 or more")
    return found
