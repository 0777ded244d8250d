"""Plots: a run's curves from its metrics file, and a table of methods as accuracy against trainable parameters."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.errors import DataError
from research.files import write_bytes
from research.train.metrics import read


def figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib's, in inches, which `save` writes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=150, layout="tight")
    FigureCanvasAgg(made)
    return made


def save(drawn: Any, png: str | Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    content = io.BytesIO()
    drawn.savefig(content, format="png")
    write_bytes(Path(png), content.getvalue())


def curve(
    metrics_jsonl: str | Path, png: str | Path, names: Sequence[str] = ("loss", "eval/loss", "eval/accuracy")
) -> None:
    """Draws each of `names` that occurs in a metrics file against the step, one panel each."""
    rows = read(metrics_jsonl)
    series = {n: [(r["step"], r[n]) for r in rows if r.get(n) is not None] for n in names}
    series = {n: points for n, points in series.items() if points}
    if not series:
        raise DataError(f"{metrics_jsonl} has none of {', '.join(names)}")
    drawn = figure(4.2 * len(series), 3.2)
    for place, (name, points) in enumerate(series.items(), 1):
        axes = drawn.add_subplot(1, len(series), place)
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="." if len(points) < 50 else None)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
    save(drawn, png)


def scatter(
    rows: Sequence[Mapping[str, Any]],
    png: str | Path,
    *,
    label: str = "method",
    x: str = "trainable",
    y: str = "accuracy",
    error: str = "std",
    title: str = "",
) -> None:
    """Draws one labelled point a row: `y` with an error bar (0 if absent) against `x` on a logarithmic axis.

    Raises DataError without a row.
    """
    if not rows:
        raise DataError("nothing to plot: the table has no row")
    drawn = figure(8, 5)
    axes = drawn.add_subplot()
    axes.set_xscale("log")
    colors = [f"C{place % 10}" for place in range(len(rows))]
    for r, color in zip(rows, colors, strict=True):
        axes.errorbar(r[x], r[y], yerr=r.get(error) or 0.0, fmt="o", capsize=3, color=color)
    axes.set(xlabel=f"{x} parameters", ylabel=f"{y} (mean ± std)", title=title)
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    _label(drawn, axes, [(r[x], r[y], r.get(error) or 0.0, str(r[label])) for r in rows], colors)
    save(drawn, png)


def _label(figure: Any, axes: Any, points: Sequence[tuple[float, float, float, str]], colors: Sequence[str]) -> None:
    """Writes each label where it covers the fewest other labels and error bars, near its point first."""
    figure.canvas.draw()
    bars = [
        [axes.transData.transform((x, y + part * e)) for part in (k / 10 - 1 for k in range(21))]
        for x, y, e, _ in points
    ]
    offsets = [
        (right * across, up)
        for across, up in itertools.product((8, 24, 48), (3, -10, 16, -23, 29, -36, 42, -49, 55, -62))
        for right in (1, -1)
    ]
    taken: list[Any] = []
    for number, (x, y, _, text) in enumerate(points):
        best = None
        for offset in sorted(offsets, key=lambda o: abs(o[0]) + abs(o[1])):
            note = axes.annotate(
                text,
                (x, y),
                offset,
                textcoords="offset points",
                fontsize=8,
                color=colors[number],
                ha="left" if offset[0] > 0 else "right",
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colors[number]}
                if max(map(abs, offset)) > 20
                else None,
            )
            box = note.get_window_extent()
            cost = 20 * sum(box.overlaps(t) for t in taken) + sum(box.contains(*d) for bar in bars for d in bar)
            cost += 20 * (not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)))
            if best is None or cost < best[0]:
                if best:
                    best[1].remove()
                best = (cost, note, box)
            else:
                note.remove()
            if cost == 0:
                break
        taken.append(best[2])
