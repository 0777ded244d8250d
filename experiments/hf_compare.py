"""Sets our accuracies beside Hugging Face PEFT's on the very same test sentences, with a paired 95 % interval.

    python -m experiments.hf_compare --table=runs/peft_table-published --reference=hf_reference

Reads what `peft_table` and `hf_reference` have written; trains nothing. A method is compared where both have it at the
same seeds, and refused where data or recipe were not the same. The interval is that of the mean over sentences of the
difference in correctness, averaged over seeds: sentences are paired, so what makes a sentence hard for both cancels.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tabulate import tabulate

from experiments.shared import common
from experiments.shared.entries import read_result
from research.data import text
from research.errors import DataError

PARTS = ("train", "validation", "test")
Predictions = dict[str, dict[int, np.ndarray]]  # {method: {seed: [N]}}


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_string("table", "runs/peft_table-published", "Working directory of `peft_table`.")
    flags.DEFINE_string("reference", "hf_reference", "Working directory of `hf_reference`.")
    flags.DEFINE_string("data", "vader/movie", "What both were trained on.")


def main() -> None:
    values = flags.FLAGS
    test = text.load(values.data).test
    theirs, settings = read_reference(Path(values.reference))
    if test.fingerprint != settings["data"].split("-")[-1]:
        raise DataError(f"--data={values.data} is not what {values.reference} was tested on.")
    ours = read_table(Path(values.table), settings)
    rows = [compare(name, ours[name], theirs[name], test.labels) for name in theirs if name in ours]
    if not rows:
        raise DataError(
            f"no method in both: {', '.join(ours)} in {values.table}, {', '.join(theirs)} in {values.reference}."
        )
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def read_table(folder: Path, settings: dict[str, Any]) -> Predictions:
    """Our predictions. DataError where a row was made with other `settings` than the reference's."""
    found = {}
    for path in sorted(folder.glob("methods/*/result.json")):
        result = read_result(path)
        identity, row = result["identity"], result["row"]
        common.check_keys(row, {"predictions": list}, path)
        common.check_keys(identity, {"data": str, "recipe": dict}, path)
        mine = {k: identity["recipe"].get(k) for k in settings if k != "data"} | {"data": identity["data"]}
        if mine != settings:
            raise DataError(f"{path} can't be set beside the reference: {common.differences(mine, settings)}.")
        found[row["method"]] = {seed: digits(p, path) for seed, p in enumerate(row["predictions"])}
    return found


def read_reference(folder: Path) -> tuple[Predictions, dict[str, Any]]:
    """The reference's predictions at the learning rate it chose, and its settings as ours are called."""
    path = folder / "results.json"
    if not path.exists():
        raise DataError(f"{path} does not exist: run experiments.hf_reference first.")
    results = common.read_json(path, settings=dict, summary=list, runs=list)
    made = results["settings"]
    common.check_keys(made, {"steps": int, "batch_size": int, "max_length": int, "fingerprints": dict}, path)
    common.check_keys(made["fingerprints"], dict.fromkeys(PARTS, str), path)
    settings = {name: made[name] for name in ("steps", "batch_size", "max_length")}
    settings["data"] = "-".join(made["fingerprints"][part] for part in PARTS)
    found: Predictions = {}
    try:
        chosen = {row["method"]: row["learning_rate"] for row in results["summary"]}
        for run in results["runs"]:
            if run["learning_rate"] == chosen.get(run["method"]):
                found.setdefault(run["method"], {})[run["seed"]] = digits(run["test_predictions"], path)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: a run or a row of its summary lacks {error}.") from None
    return found, settings


def digits(predictions: str | list[int], where: Path) -> np.ndarray:
    """Class numbers [N]."""
    try:
        return np.array(list(predictions), int)
    except (TypeError, ValueError):
        raise DataError(f"{where} is damaged: predictions are not class numbers.") from None


def compare(name: str, ours: dict, theirs: dict, labels: np.ndarray) -> dict[str, Any]:
    """One row; accuracies in per cent, difference ours - theirs in points. DataError without a common seed."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        raise DataError(f"{name}: no seed in both: ours are {sorted(ours)}, the reference's {sorted(theirs)}.")
    if any(len(runs[s]) != len(labels) for runs in (ours, theirs) for s in seeds):
        raise DataError(f"{name}: a run has not one prediction for each of the {len(labels)} test sentences.")
    right = np.array([[np.equal(runs[s], labels) for s in seeds] for runs in (ours, theirs)])  # [2, seeds, N]
    difference = 100 * (right[0].mean(axis=0) - right[1].mean(axis=0))
    mean, half = difference.mean(), 1.96 * difference.std(ddof=1) / np.sqrt(len(labels))
    return {
        "method": name,
        "seeds": len(seeds),
        "ours %": f"{100 * right[0].mean():.1f}",
        "Hugging Face %": f"{100 * right[1].mean():.1f}",
        "difference": f"{mean:+.1f}",
        "95 % interval": f"{mean - half:+.1f} to {mean + half:+.1f}",
    }


if __name__ == "__main__":
    define_flags()
    common.run(main)
