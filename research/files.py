"""Writing files so that a reader sees the whole of the new one or the whole of the old one, whatever happens in
between.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from research.errors import ModelError


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_directory(
    directory: Path, fill: Callable[[Path], None], ours: Callable[[Path], bool], needed: int = 0
) -> None:
    """Lets `fill` write into a temporary sibling, which then takes the directory's name.

    An empty directory, or one that is `ours`, is replaced; anything else is left alone. `needed` (bytes) is for the
    message of a full disk. Raises ModelError.
    """
    if directory.exists() and not (directory.is_dir() and (not any(directory.iterdir()) or ours(directory))):
        raise ModelError(f"{directory} exists and holds something else: choose another directory.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
            fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
            fresh.mkdir()
            fill(fresh)
            if directory.exists():
                directory.rename(old)
            try:
                fresh.rename(directory)
            except OSError:
                if old.exists():
                    old.rename(directory)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(p for p in directory.parents if p.exists())).free
            need = f" needs more than {needed} bytes, {free} are free" if needed else f": {free} bytes are free"
            raise ModelError(f"disk full: {directory}{need}; nothing written.") from error
        raise ModelError(f"cannot write {directory}: {error.strerror or error}; nothing written.") from error
