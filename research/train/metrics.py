"""Metrics as JSON lines, one object a line, and the progress bar.

{"step": 120, "loss": 0.4121, "grad_norm": 1.3, ...}
{"step": 120, "eval/accuracy": 0.8421, "eval/accuracy/seeds": [0.84, 0.85, 0.83], ...}
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.errors import DataError

Row = dict[str, Any]


class Writer:
    """Appends rows to `path`.

    A line is one write, so that a killed process leaves whole lines, but for perhaps the last.
    """

    def __init__(self, path: str | Path):
        self.path, self.warned = Path(path), False
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: Row) -> None:
        """Losing a line is no reason to lose a run: when the disk is full, say so once and go on."""
        line = (json.dumps({k: _finite(v) for k, v in row.items()}) + "\n").encode()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            if not self.warned:
                say(f"metrics are not written to {self.path}: {error.strerror}")
            self.warned = True

    def resume(self, step: int) -> list[Row]:
        """Drops rows after `step`, which are about to be written again, and returns the others."""
        if not self.path.exists():
            return []
        rows = [row for row in read(self.path) if row.get("step", 0) <= step]
        draft = self.path.with_name(self.path.name + ".tmp")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(draft, self.path)
        return rows


def read(path: str | Path) -> list[Row]:
    """All rows of a file.

    A broken last line is what a killed process leaves and is left out; any other raises DataError.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise DataError(f"cannot read metrics from {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise DataError(f"{path} line {number} is not JSON: {line[:60]!r}") from None
    return rows


def row(step: int, values: Mapping[str, Any], prefix: str = "") -> Row:
    """Makes a row from scalars; a value with a seed axis [S] becomes its mean and, under NAME/seeds, the list."""
    out: Row = {"step": step}
    for name, value in values.items():
        value = np.asarray(value)
        out[prefix + name] = bool(value.all()) if value.dtype == bool else float(np.mean(value, dtype=np.float64))
        if value.ndim and value.dtype != bool:
            out[f"{prefix}{name}/seeds"] = value.tolist()
    return out


def say(text: str) -> None:
    """One line on stderr that does not break a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A bar with loss and rate; where stderr is not a terminal, about ten plain lines instead."""

    def __init__(self, start: int, steps: int, label: str = "", unit: str = "rows"):
        from tqdm import tqdm

        self.start, self.steps, self.label, self.unit = start, steps, label or "train", unit
        self.every = max(1, steps // 10)
        self.began = time.perf_counter()
        self.bar = tqdm(total=steps, initial=start, desc=self.label, file=sys.stderr) if sys.stderr.isatty() else None

    def update(self, step: int, loss: float, rate: float) -> None:
        """`step` steps are done; rate is in units per second."""
        text = f"loss {loss:.4f}, {rate:,.0f} {self.unit}/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.every == 0 or step == self.steps:
            left = (time.perf_counter() - self.began) / max(1, step - self.start) * (self.steps - step)
            say(f"{self.label}: step {step}/{self.steps}, {text}, {left:.0f} s left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
