"""Adapter directories are replaced whole or not at all, and only where they are adapters."""

import errno
import os
import resource
from pathlib import Path

import pytest

from research.errors import ModelError
from research.peft import adapter
from tests import tiny
from tests.peft.test_adapter import BASE, attached, write


def test_saving_again_replaces(tmp_path):
    case = write(tmp_path / "a", "lora:rank=2")
    other = case.variables
    adapter.save(tmp_path / "a", case.spec, other, case.sites, BASE)
    assert tiny.same(attached(tmp_path / "a", case)["peft"], other["peft"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    (tmp_path / "new").mkdir()
    adapter.save(tmp_path / "new", case.spec, other, case.sites, BASE)
    adapter.save(tmp_path / "deep" / "er" / "x", case.spec, other, case.sites, BASE)


def test_a_foreign_directory_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ModelError, match="holds something else"):
        write(tmp_path / "thesis")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="holds something else"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "thesis"]
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def stop_at(where, error, target, monkeypatch):
    """Makes one of the ways in which a save ends early happen."""

    def stop(*_, **__):
        raise error

    if where == "weights":
        monkeypatch.setattr("safetensors.numpy.save_file", stop)
    elif where == "json":
        monkeypatch.setattr("pathlib.Path.write_text", stop)
    elif where == "rename":
        real, calls = Path.rename, []

        def rename(self, to):
            calls.append(to)
            return stop() if Path(to) == target and calls.count(to) == 1 else real(self, to)

        monkeypatch.setattr("pathlib.Path.rename", rename)
    else:  # for real: the writer in Rust meets the system's limit on a file's size
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("where", ["weights", "json", "rename", "limit"])
def test_a_save_that_ends_early_leaves_the_old_adapter(where, error, tmp_path, monkeypatch):
    case = write(tmp_path / "a", "lora:rank=2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    stop_at(where, error, tmp_path / "a", monkeypatch)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) and where != "limit" else ModelError
    try:
        with pytest.raises(expected, match="disk full|cannot write" if expected is ModelError else None):
            adapter.save(tmp_path / "a", case.spec, case.variables, case.sites, BASE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert tiny.same(attached(tmp_path / "a", case)["peft"], case.point["peft"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"], "nothing half-written is left"
