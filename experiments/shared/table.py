"""The table of methods, as Markdown, CSV and a plot of accuracy against trainable parameters."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.files import write_text
from research.train import plot

Row = dict[str, Any]

# Heading -> (column, its format). "step MB" is the memory of the compiled step, which is one program of all seeds.
CELLS = {
    "method": ("method", ""),
    "trainable": ("trainable", ","),
    "%": ("percent", ".3f"),
    "accuracy %": ("accuracy", ""),
    "rate": ("rate", "g"),
    "train s/run": ("train_s", ".0f"),
    "ms/step": ("step_ms", ".0f"),
    "step MB (all seeds)": ("step_mb", ".0f"),
    "adapter kB": ("adapter_kb", ",.0f"),
}
# Column -> type of its values; a run of one step has no time of a step.
COLUMNS = {"method": str, "trainable": int} | dict.fromkeys(("percent", "accuracy", "std", "rate"), int | float)
COLUMNS |= dict.fromkeys(("train_s", "step_ms"), int | float | None)
COLUMNS |= dict.fromkeys(("step_mb", "adapter_kb"), int | float)


def markdown(rows: Sequence[Row]) -> str:
    """The table with accuracy in per cent, mean ± standard deviation over seeds."""
    lines = ["| " + " | ".join(CELLS) + " |", "|---" + "|--:" * (len(CELLS) - 1) + "|"]
    for row in rows:
        shown = row | {"accuracy": f"{100 * row['accuracy']:.1f} ± {100 * row['std']:.1f}"}
        cells = ("-" if shown[name] is None else format(shown[name], spec) for name, spec in CELLS.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], folder: Path, title: str) -> None:
    """Writes table.md, table.csv and table.png atomically."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(folder / "table.csv", text.getvalue())
    write_text(folder / "table.md", f"{title}\n\n{markdown(rows)}")
    points = [
        r | {"accuracy": 100 * r["accuracy"], "std": 100 * r["std"], "trainable": max(1, r["trainable"])} for r in rows
    ]
    plot.scatter(points, folder / "table.png", y="accuracy", title=title.split(":")[0])
