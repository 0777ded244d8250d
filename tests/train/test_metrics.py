import errno
import json
import os

import numpy as np
import pytest

from research.errors import DataError, ModelError
from research.train import metrics, plot


def test_rows_come_back_and_resume_drops_what_will_be_written_again(tmp_path):
    writer = metrics.Writer(tmp_path / "a" / "m.jsonl")
    for k in range(1, 6):
        writer.write({"step": k, "loss": k / 10})
    with open(writer.path, "a") as f:
        f.write('{"step": 6, "lo')  # what a kill leaves
    assert [r["step"] for r in metrics.read(writer.path)] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in writer.resume(3)] == [1, 2, 3]
    for k in (4, 5):
        writer.write({"step": k, "loss": 9.0})
    assert [r["step"] for r in metrics.read(writer.path)] == [1, 2, 3, 4, 5]
    assert metrics.read(writer.path)[-1]["loss"] == 9.0


def test_broken_rows_are_dropped_once_and_for_all_with_one_notice(tmp_path, capsys):
    writer = metrics.Writer(tmp_path / "m")
    writer.path.write_bytes(b'{"step": 1}\nnonsense\n17\n{"step": "x"}\n\0\xff\n{"step": 2}\n{"step": 3')
    assert writer.resume(9) == [{"step": 1}, {"step": 2}]
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "4 broken rows" in notice and "line 2" in notice
    assert writer.resume(9) == [{"step": 1}, {"step": 2}] and capsys.readouterr().err == ""
    with pytest.raises(DataError, match="cannot read metrics"):
        metrics.read(tmp_path / "none")


def test_a_row_after_half_a_row_is_whole(tmp_path):
    writer = metrics.Writer(tmp_path / "m")
    writer.path.write_text('{"step": 1}\n{"st')
    writer.write({"step": 2})
    writer.write({"step": 3})
    assert [r["step"] for r in metrics.read(writer.path)] == [1, 2, 3]


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(metrics.os, "write", lambda handle, data: write(handle, data[:5]))
    writer = metrics.Writer(tmp_path / "m")
    writer.write({"step": 1, "loss": 0.25})
    writer.write({"step": 2, "loss": 0.5})
    assert [json.loads(line)["loss"] for line in writer.path.read_text().splitlines()] == [0.25, 0.5]


def test_resume_that_cannot_write_keeps_the_rows(tmp_path, monkeypatch):
    writer = metrics.Writer(tmp_path / "m")
    writer.write({"step": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(ModelError, match="cannot write .*m: No space left"):
        writer.resume(0)
    assert metrics.read(writer.path) == [{"step": 1}] and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_nan_is_written_as_json(tmp_path):
    writer = metrics.Writer(tmp_path / "m")
    writer.write({"step": 1, "loss": float("nan"), "loss/seeds": [1.0, float("inf")]})
    assert json.loads((tmp_path / "m").read_text()) == {"step": 1, "loss": None, "loss/seeds": [1.0, None]}


def test_unwritable_file_is_said_once_and_no_reason_to_stop(tmp_path, capsys):
    writer = metrics.Writer(tmp_path / "m")
    (tmp_path / "m").mkdir()
    writer.write({"step": 1})
    writer.write({"step": 2})
    assert capsys.readouterr().err.count("not written") == 1


def test_row_of_seeds_has_mean_and_list():
    row = metrics.row(
        3, {"loss": np.float32(0.5), "acc": np.array([0.0, 1.0]), "finite": np.array([True, False])}, "x/"
    )
    assert row == {"step": 3, "x/loss": 0.5, "x/acc": 0.5, "x/acc/seeds": [0.0, 1.0], "x/finite": False}


def test_progress_is_plain_lines_without_a_terminal(capsys):
    progress = metrics.Progress(0, 100, "lora")
    for k in range(1, 101):
        progress.update(k, 0.5, 1234.0, "tokens")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0].startswith("lora: step 10/100, loss 0.5000, 1,234 tokens/s")


def test_curve_draws_what_is_there(tmp_path):
    writer = metrics.Writer(tmp_path / "m")
    with pytest.raises(DataError):
        writer.write({"step": 1, "other": 1.0})
        plot.curve(writer.path, tmp_path / "c.png")
    writer.write({"step": 1, "loss": 2.0})
    writer.write({"step": 2, "loss": float("nan"), "eval/accuracy": 0.5})
    plot.curve(writer.path, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    figure, png = plot.figure(2, 2), tmp_path / "deep" / "c.png"
    plot.save(figure, png)
    before = png.read_bytes()

    def cut(path, content):
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", cut)
    figure.suptitle("new")
    with pytest.raises(ModelError, match="cannot write .*c.png: No space left on device"):
        plot.save(figure, png)
    assert png.read_bytes() == before and [p.name for p in png.parent.iterdir()] == ["c.png"]


def test_scatter_labels_do_not_cover_each_other(tmp_path, monkeypatch):
    figures, save = [], plot.save
    monkeypatch.setattr(plot, "save", lambda figure, png: (figures.append(figure), save(figure, png)))
    rows = [
        {
            "method": f"method-{i}",
            "trainable": 10 ** (3 + i % 4),
            "accuracy": 0.8 + 0.002 * i,
            "std": 0.01 if i else None,
        }
        for i in range(11)
    ]
    plot.scatter(rows, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 5000
    axes = figures[0].axes[0]
    assert axes.get_xscale() == "log"
    boxes = [t.get_window_extent() for t in axes.texts]
    assert [t.get_text() for t in axes.texts] == [r["method"] for r in rows]
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    with pytest.raises(DataError):
        plot.scatter([], tmp_path / "e.png")
