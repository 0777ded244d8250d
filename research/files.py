"""Writing files so that a reader sees the whole of the new one or the whole of the old one, whatever happens in
between.

Of the processes of one run the first writes; the others run the same lines inside `left_to_another`, which makes these
functions do nothing.
"""

import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from research.errors import ModelError

_here = True  # whether this process writes


def writes() -> bool:
    """Whether this process is the one that writes."""
    return _here


@contextmanager
def left_to_another() -> Iterator[None]:
    """Nothing is written inside, since another process writes the same."""
    global _here
    _here = False
    try:
        yield
    finally:
        _here = True


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically. Raises ModelError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically, making its folder if need be. Raises ModelError."""
    if not writes():
        return
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(f"cannot write {path}: {reason}; what was there before is unchanged") from error


def replace_directory(
    directory: Path, fill: Callable[[Path], None], ours: Callable[[Path], bool], needed: int = 0
) -> int:
    """Lets `fill` write into a temporary sibling, which then takes the directory's name; returns the bytes written.

    An empty directory, or one that is `ours`, is replaced; anything else is left alone. `needed` (bytes) is for the
    message of a full disk. One process at a time may write a directory; what a killed one left is cleared, and the old
    directory put back where the new one had not yet taken its name. Raises ModelError.
    """
    if not writes():
        return 0
    try:
        _recover(directory)
        if directory.exists() and not (directory.is_dir() and (not any(directory.iterdir()) or ours(directory))):
            raise ModelError(f"{directory} exists and holds something else: choose another directory.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
            fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
            fresh.mkdir()
            fill(fresh)
            size = sum(f.stat().st_size for f in fresh.rglob("*") if f.is_file())
            try:
                if directory.exists():
                    directory.rename(old)
                fresh.rename(directory)
            except BaseException:  # Ctrl-C too: with `scratch` goes `old`
                if old.exists() and not directory.exists():
                    old.rename(directory)
                raise
        return size
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(p for p in directory.parents if p.exists())).free
            need = f" needs more than {needed} bytes, {free} are free" if needed else f": {free} bytes are free"
            raise ModelError(f"disk full: {directory}{need}; nothing written.") from error
        raise ModelError(f"cannot write {directory}: {error.strerror or error}; nothing written.") from error


def os_error(error: Exception, what: str) -> OSError:
    """The OSError behind a failed write of a Rust library (safetensors, tokenizers), which raises a type of its own."""
    full = f"os error {errno.ENOSPC}" in str(error)
    return OSError(errno.ENOSPC if full else errno.EIO, f"{what}: {error}")


def _recover(directory: Path) -> None:
    """Clears the scratch folders of killed processes."""
    for scratch in directory.parent.glob(f".{glob.escape(directory.name)}-*"):
        # Only tempfile's own names: `.NAME-notes` is somebody's, `.NAME-2-k3j9x0qa` belongs to the directory NAME-2.
        if not (re.fullmatch("[a-z0-9_]{8}", scratch.name[len(directory.name) + 2 :]) and scratch.is_dir()):
            continue
        if {path.name for path in scratch.iterdir()} <= {"fresh", "old"}:
            if (scratch / "old").exists() and not directory.exists():
                (scratch / "old").rename(directory)
            shutil.rmtree(scratch, ignore_errors=True)
