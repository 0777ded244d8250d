"""Ends of a write that come too early: what was there before must stay, or come back."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from research.errors import ModelError
from research.files import left_to_another, replace_directory, write_bytes, write_text

# Writes "new" over "old" and is killed when the old directory has gone and the new one has not yet come.
KILLED = """
import os, signal, sys
from pathlib import Path
from research.files import replace_directory

directory, rename = Path(sys.argv[1]), Path.rename
def dying(self, to):
    if self.name == "fresh":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, to)
Path.rename = dying
replace_directory(directory, lambda d: (d / "x").write_text("new"), lambda d: True)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(directory: Path, text: str) -> None:
    replace_directory(directory, lambda d: (d / "x").write_text(text), ours=lambda d: (d / "x").exists())


def failing(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(errno.EIO, "I/O error")])
def test_the_old_directory_comes_back_whatever_stops_the_second_rename(tmp_path, monkeypatch, error):
    save(tmp_path / "a", "old")
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: failing(error)() if self.name == "fresh" else rename(self, to))
    with pytest.raises(ModelError if isinstance(error, OSError) else type(error)):
        save(tmp_path / "a", "new")
    assert (tmp_path / "a" / "x").read_text() == "old" and names(tmp_path) == ["a"]


def test_the_new_directory_stays_when_stopped_right_after_the_second_rename(tmp_path, monkeypatch):
    save(tmp_path / "a", "old")
    rename = Path.rename

    def stopped(self, to):
        rename(self, to)
        if self.name == "fresh":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a", "new")
    assert (tmp_path / "a" / "x").read_text() == "new" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["a", "a[b]*"])
def test_a_kill_between_the_renames_is_mended_by_the_next_save(tmp_path, name):
    directory = tmp_path / name
    save(directory, "old")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(directory)], env=environment)
    assert killed.returncode == -signal.SIGKILL and not directory.exists()
    with pytest.raises(ZeroDivisionError):
        replace_directory(directory, lambda d: 1 / 0, ours=lambda d: (d / "x").exists())
    assert (directory / "x").read_text() == "old" and names(tmp_path) == [name]
    save(directory, "new")
    assert (directory / "x").read_text() == "new" and names(tmp_path) == [name]


def test_what_is_not_a_leftover_of_this_directory_stays(tmp_path):
    others = [".a-notes", ".a-2-k3j9x0qa", ".a-k3j9x0qb", ".ab-k3j9x0qa"]
    for other in others:
        (tmp_path / other / ("mine" if other.endswith("b") else "old")).mkdir(parents=True)
    (tmp_path / ".a-k3j9x0qc").write_text("a file")
    save(tmp_path / "a", "new")
    assert names(tmp_path) == sorted([*others, ".a-k3j9x0qc", "a"])


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_written_is_named_and_unchanged(tmp_path, monkeypatch, method, error):
    path = tmp_path / "deep" / "x.txt"
    write_text(path, "old é")
    monkeypatch.setattr(Path if method == "write_bytes" else os, method, failing(error))
    with pytest.raises(ModelError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        write_bytes(path, b"new")
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {path}: {error.strerror}; what was there before is unchanged"
    assert path.read_text(encoding="utf-8") == "old é" and names(path.parent) == ["x.txt"]


def test_a_folder_that_is_a_file_is_a_model_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="cannot write .*file/x: "):
        write_text(tmp_path / "file" / "x", "y")


def test_what_another_process_writes_is_left_to_it(tmp_path):
    with left_to_another():
        write_text(tmp_path / "a.txt", "x")
        assert replace_directory(tmp_path / "b", lambda d: 1 / 0, lambda d: True) == 0
    assert not list(tmp_path.iterdir())
    write_text(tmp_path / "a.txt", "x")
    assert replace_directory(tmp_path / "b", lambda d: write_text(d / "c" / "y", "123"), lambda d: True) == 3
