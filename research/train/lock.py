"""One process a run folder."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from research.errors import FlagError


@contextlib.contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Holds a run folder, made if need be: a second process gets a FlagError that names the first.

    The kernel frees the lock of a dead process, so none is ever stale. Of the processes of one run the first holds it
    for all. Raises FlagError too for a folder that cannot be made or written.
    """
    distributed = sys.modules.get("jax._src.distributed")  # without starting a backend, and without jax where it is not
    if distributed and distributed.global_state.process_id:
        yield
        return
    path = Path(folder) / "LOCK"
    me = {"pid": os.getpid(), "host": socket.gethostname()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except (FileExistsError, NotADirectoryError) as error:
        raise FlagError(f"the run folder {folder} is a file, or lies below one: choose another folder") from error
    except OSError as error:
        raise FlagError(
            f"cannot write to the run folder {folder}: {error.strerror}. Choose another folder or mend this one"
        ) from error
    try:
        owner = os.read(handle, 1000).decode(errors="replace")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlagError(f"the run folder {folder} is in use by {owner or 'another process'}") from None
        except OSError as error:
            print(f"the run folder {folder} cannot be locked ({error.strerror}); going on without", file=sys.stderr)
        if owner:
            print(f"took over the lock of a process that died: {owner}", file=sys.stderr)
        os.ftruncate(handle, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only nameless
            os.pwrite(handle, "pid {pid} on {host}".format(**me).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)
