"""Joins the processes of a run into one mesh, and lets none of them outlive another.

    with distributed.run():            # on one machine: nothing happens
        ...                            # jax.devices() are those of all processes

A process finds the others by what is given, else by SLURM's variables, else by the TPU runtime's; `jax.distributed`
does the rest. A process that fails puts its reason where the others look (the coordinator's key-value store) and leaves
with status 1 at once; a watcher thread in each of the others prints that reason and ends its process too, which a
collective that waits for the lost one would never do. A process that is killed outright leaves no reason: then it is
jax's own heartbeat that ends the others, after `heartbeat` seconds. A process that is told to stop tells the others,
and all of them stop after the same step.
"""

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

import jax

from research.errors import FlagError, UserError
from research.train.signals import Interrupted

T = TypeVar("T")
KEY, STOP, FAILED = "peftree/failed", "peftree/stop", 1
POLL = 0.5  # seconds between two looks
AHEAD = 3  # steps; see `Together`


class Place(NamedTuple):
    """Where a process stands. All None: the TPU runtime knows."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def find(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Place | None:
    """This process's place, or None where it is alone. Arguments go before SLURM's variables, those before a TPU pod's.

    Raises FlagError: only some of the three arguments, or a process number outside the run.
    """
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < 3:
        if missing:
            raise FlagError(f"coordinator, processes and process_id go together: {', '.join(missing)} is missing")
        if not re.fullmatch(r"[^\s:]+:\d+|\[[^\]]+\]:\d+", coordinator):
            raise FlagError(f"coordinator={coordinator!r} is no address, as in 10.0.0.2:8476")
        if not 0 <= process_id < processes:
            raise FlagError(f"process_id={process_id} of processes={processes}: valid are 0 to {processes - 1}")
        return Place(coordinator, processes, process_id) if processes > 1 else None
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in environ and int(tasks) > 1:
        port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096  # two jobs on a node don't meet
        nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        return Place(f"{first_host(nodes)}:{port}", int(tasks), int(environ["SLURM_PROCID"]))
    workers = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(workers) > 1 or int(environ.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return Place()
    return None


def first_host(nodes: str) -> str:
    """The first name of SLURM's list: "gpu[003-007,9],x1" is gpu003."""
    head = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", nodes)
    if head is None:
        raise FlagError(f"SLURM's node list {nodes!r} has no host in it")
    return "".join(part or "" for part in head.groups())


@contextmanager
def run(place: Place | None = None, heartbeat: int = 100) -> Iterator[bool]:
    """Joins the run, and yields whether this process is the one that writes logs. See the module for how it ends.

    Call it before anything touches a device. On CPUs the collectives are gloo's.
    """
    if place is None:
        yield True
        return
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(*place, heartbeat_timeout_seconds=heartbeat)
    from jax._src.distributed import global_state  # the only way to the key-value store

    client, done = global_state.client, threading.Event()
    threading.Thread(target=_watch, args=(client, done), daemon=True).start()
    try:
        yield jax.process_index() == 0
    except BaseException as error:
        if isinstance(error, Interrupted) or (isinstance(error, SystemExit) and not error.code):
            done.set()
            jax.distributed.shutdown()
            raise
        text = str(error) or type(error).__name__
        if not isinstance(error, UserError):
            traceback.print_exc()
        done.set()
        try:
            reason = f"process {jax.process_index()} failed: {' '.join(text.split())}"
            client.key_value_set(KEY, reason, allow_overwrite=True)
            _leave(reason, getattr(error, "exit_status", FAILED), linger=jax.process_index() == 0)
        finally:
            os._exit(FAILED)
    else:
        done.set()
        jax.distributed.shutdown()


def is_main() -> bool:
    """Whether this process writes logs, metrics and configuration."""
    return jax.process_index() == 0


def after_first(make: Callable[[], T]) -> T:
    """`make()`, which takes what it finds in a folder and else writes it: first in process 0, then in the others."""
    if jax.process_count() == 1:
        return make()
    from jax.experimental import multihost_utils

    made = make() if is_main() else None
    multihost_utils.sync_global_devices("made by the first process")
    return made if is_main() else make()


class Together:
    """Whether to stop after a step: true in all processes after the same one, once any of them was signalled.

    The one that was names a step ahead of it in the coordinator's store, before it goes on. A loop that waits for step
    k - 1 once it has dispatched step k is at most two steps ahead of another, so none is past the step named.
    """

    def __init__(self, signalled: Callable[[], bool]):
        self.signalled, self.several = signalled, jax.process_count() > 1

    def __call__(self, done: int) -> bool:
        if not self.several:
            return self.signalled()
        from jax._src.distributed import global_state

        if self.signalled():
            with suppress(Exception):  # another has named one
                global_state.client.key_value_set(STOP, str(done + AHEAD))
        try:
            return done >= int(global_state.client.key_value_try_get(STOP))
        except Exception:  # nobody has
            return False

    def alone(self) -> bool:
        """Whether this process may stop on its own, in the middle of something, for having been signalled."""
        return not self.several and self.signalled()


def _watch(client, done: threading.Event) -> None:
    while not done.wait(POLL):
        try:
            reason = client.key_value_try_get(KEY)
        except Exception:  # nothing there, or the coordinator has gone, which jax itself reports
            continue
        _leave(reason, FAILED, linger=jax.process_index() == 0)


def _leave(reason: str, status: int, linger: bool) -> None:
    """Ends the process without waiting for devices. Process 0, which has the store, waits for the others to look."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    if linger:
        threading.Event().wait(4 * POLL)
    os._exit(status)
