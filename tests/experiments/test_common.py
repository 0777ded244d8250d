"""How a script ends, whatever ended it; JSON that is always JSON; settings that differ."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from experiments.shared import common
from research.errors import DataError, FlagError


def ended(main, monkeypatch, capsys) -> tuple[int, str]:
    """(exit status, stderr) of a script with this main."""
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as stop:
        common.run(main)
    flags.FLAGS.unparse_flags()
    return stop.value.code or 0, capsys.readouterr().err


def raising(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 4, "error: No space left on device."),
        (OSError(errno.EIO, "Input/output error", "/data/x"), 4, "error: /data/x: Input/output error."),
        (OSError("cannot open resource"), 4, "error: cannot open resource."),
        (OSError(), 4, "error: OSError."),
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C."),
    ],
)
def test_what_the_system_refuses_is_one_line(error, status, line, monkeypatch, capsys):
    assert ended(raising(error), monkeypatch, capsys) == (status, line + "\n")


def test_sigterm_ends_a_script_at_once_and_quietly(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert ended(lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch, capsys) == (143, "")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_machine_without_git_has_no_revision(monkeypatch):
    def run(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr(subprocess, "run", run)
    found = common.environment()
    assert found["revision"] is None and found["versions"]["jax"]


def test_json_has_no_nan(tmp_path: Path):
    common.write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "d": (1,)})
    strict = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda x: pytest.fail(x))
    assert strict == {"a": [None, 1.5], "b": {"c": None}, "d": [1]}


def test_json_is_read_with_its_types(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"a": 1, "b": "2"}')
    assert common.read_json(tmp_path / "x.json", a=int, b=str) == {"a": 1, "b": "2"}
    with pytest.raises(DataError, match="x.json is damaged: it has no valid 'b', 'c'"):
        common.read_json(tmp_path / "x.json", a=int, b=int, c=int)
    with pytest.raises(DataError, match="cannot read .*y.json"):
        common.read_json(tmp_path / "y.json")


def test_what_differs_is_named():
    found = {"rate": 1e-3, "recipe": {"steps": 300, "clip": 1.0}, "base": "f" * 64}
    assert common.differences(found, found) == ""
    wanted = found | {"recipe": {"steps": 60, "clip": 1.0}, "base": "e" * 64}
    assert common.differences(found, wanted) == "steps=300, not 60; base=ffffffffffff, not eeeeeeeeeeee"
    with pytest.raises(FlagError, match="runs holds a result with steps=300, not 60; .*: give another --workdir"):
        common.refuse_other(found, wanted, "runs holds a result")
