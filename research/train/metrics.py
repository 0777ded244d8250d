"""Metrics as JSON lines, one object a line, and the progress bar.

{"step": 120, "loss": 0.4121, "grad_norm": 1.3, ...}
{"step": 120, "eval/accuracy": 0.8421, "eval/accuracy/seeds": [0.84, 0.85, 0.83], ...}
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.errors import DataError
from research.files import write_text, writes

Row = dict[str, Any]


class Writer:
    """Appends rows to `path`, and hands them to `trackers`.

    A killed process or a full disk leaves whole lines, but for perhaps the last; the next row begins a line of its own.
    """

    def __init__(self, path: str | Path, trackers: Sequence[Any] = ()):
        self.path, self.trackers, self.warned = Path(path), trackers, False
        if writes():
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: Row) -> None:
        """Losing a line is no reason to lose a run: when the disk is full, say so once and go on."""
        self.track(row)
        if not writes():
            return
        line = (json.dumps({k: _finite(v) for k, v in row.items()}) + "\n").encode()
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    line = b"\n" + line
                while line:  # a write may be short
                    line = line[os.write(handle, line) :]
            finally:
                os.close(handle)
        except OSError as error:
            if not self.warned:
                say(f"metrics are not written to {self.path}: {error.strerror}")
            self.warned = True

    def track(self, row: Row) -> None:
        """Hands a row to the trackers alone."""
        for tracker in self.trackers:
            tracker.write(row)

    def resume(self, step: int) -> list[Row]:
        """Drops rows after `step`, which are about to be written again, and broken ones; returns the others."""
        for tracker in self.trackers:
            tracker.resume(step)
        if not self.path.exists():
            return []
        rows = [row for row in read(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def read(path: str | Path) -> list[Row]:
    """All rows of a file but the broken ones: an unfinished last line, and others with one notice.

    Raises DataError for a file that cannot be read.
    """
    try:
        lines = Path(path).read_text(errors="replace").split("\n")
    except OSError as error:
        raise DataError(f"cannot read metrics from {path}: {error.strerror}") from error
    rows, broken = [], []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):  # the last is empty, or what a killed process had no time to finish
            broken.append(number)
    if broken:
        say(f"{path}: {len(broken)} broken rows are left out, the first in line {broken[0]}")
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
    """One line on stderr that does not break a progress bar. Of several processes the first says it."""
    if not writes():
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A bar with loss and rate; where stderr is not a terminal, about ten plain lines instead."""

    def __init__(self, start: int, steps: int, label: str = ""):
        from tqdm import tqdm

        self.start, self.steps, self.label = start, steps, label or "train"
        self.every = max(1, steps // 10)
        self.began = time.perf_counter()
        shown = sys.stderr.isatty() and writes()
        self.bar = tqdm(total=steps, initial=start, desc=self.label, file=sys.stderr) if shown else None

    def update(self, step: int, loss: float, rate: float, unit: str = "rows", note: str = "") -> None:
        """`step` steps are done; rate is in units per second."""
        text = f"loss {loss:.4f}, {rate:,.0f} {unit}/s" + (f", {note}" if note else "")
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.every == 0 or step == self.steps:
            left = (time.perf_counter() - self.began) / max(1, step - self.start) * (self.steps - step)
            say(f"{self.label}: step {step}/{self.steps}, {text}, {left:.0f} s left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
