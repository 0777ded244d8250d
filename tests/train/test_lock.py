import errno
import subprocess
import sys

import pytest

from research.errors import FlagError
from research.train.lock import lock


def test_lock_names_the_holder_and_dies_with_it(tmp_path, capsys):
    script = f"""
import sys, time
from research.train.lock import lock
with lock({str(tmp_path)!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FlagError, match=f"pid {holder.pid} on "), lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    capsys.readouterr()
    with lock(tmp_path):
        assert f"pid {holder.pid}" in capsys.readouterr().err
    with lock(tmp_path):
        assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_used_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FlagError, match=f"^the run folder {folder} is a file, or .*: choose another") as error:
            lock(folder).__enter__()
        assert "\n" not in str(error.value)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.open", refuse)  # root may write anywhere
    with pytest.raises(FlagError, match=f"cannot write to .*{tmp_path}: Permission denied. Choose another folder"):
        lock(tmp_path).__enter__()


def test_a_full_disk_is_locked_all_the_same(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with lock(tmp_path), pytest.raises(FlagError, match="in use by another process"), lock(tmp_path):
        pass
