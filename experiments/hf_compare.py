"""Sets our accuracies beside Hugging Face PEFT's on the very same test sentences, with a paired 95 % interval.

    python -m experiments.hf_compare --table=runs/peft_table --reference=hf_reference

Reads what `peft_table` and `hf_reference` have written; trains nothing. A method is compared where both have it at the same
seeds. The interval is that of the mean over sentences of the difference in correctness, averaged over seeds: sentences are
paired, so what makes a sentence hard for both cancels.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tabulate import tabulate

from experiments import common
from research.data import text
from research.errors import DataError

if __name__ == "__main__":
    flags.DEFINE_string("table", "runs/peft_table", "Working directory of `peft_table`.")
    flags.DEFINE_string("reference", "hf_reference", "Working directory of `hf_reference`.")
    flags.DEFINE_string("data", "vader/movie", "What both were trained on.")


def main() -> None:
    values = flags.FLAGS
    labels = text.load(values.data).test.labels
    ours, theirs = read_table(Path(values.table)), read_reference(Path(values.reference))
    rows = [compare(name, ours[name], theirs[name], labels) for name in theirs if name in ours]
    if not rows:
        raise DataError(
            f"no method in both: {', '.join(ours)} in {values.table}, {', '.join(theirs)} in {values.reference}."
        )
    print(tabulate(rows, headers="keys", tablefmt="github"))


def read_table(folder: Path) -> dict[str, dict[int, np.ndarray]]:
    """{method: {seed: predictions [N]}}."""
    found = {}
    for path in sorted(folder.glob("methods/*/result.json")):
        row = json.loads(path.read_text())["row"]
        found[row["method"]] = {seed: digits(p) for seed, p in enumerate(row["predictions"])}
    return found


def read_reference(folder: Path) -> dict[str, dict[int, np.ndarray]]:
    """The same of the reference, at the learning rate it chose."""
    path = folder / "results.json"
    if not path.exists():
        raise DataError(f"{path} does not exist: run experiments.hf_reference first.")
    results = json.loads(path.read_text())
    chosen = {row["method"]: row["learning_rate"] for row in results["summary"]}
    found: dict[str, dict[int, np.ndarray]] = {}
    for run in results["runs"]:
        if run["learning_rate"] == chosen.get(run["method"]):
            found.setdefault(run["method"], {})[run["seed"]] = digits(run["test_predictions"])
    return found


def digits(predictions: str) -> np.ndarray:
    return np.array(list(predictions), int)


def compare(name: str, ours: dict, theirs: dict, labels: np.ndarray) -> dict[str, Any]:
    """One row; accuracies in per cent, difference ours - theirs in points."""
    seeds = sorted(set(ours) & set(theirs))
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
    common.run(main)
