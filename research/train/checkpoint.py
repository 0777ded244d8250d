"""Checkpoints that are whole, checked and chosen by us. The only file that knows Orbax.

    DIRECTORY/120/state/...         Orbax: {"step": ..., "trainable": {...}, "opt_state": {...}, "rng": key data}
    DIRECTORY/120/integrity.json    written last: checksums of all leaves and files, shapes, dtypes, the caller's meta
    DIRECTORY/.saving-120/...       a save under way; renamed to 120 when complete: a killed save leaves no step behind

Orbax alone restores a flipped bit silently and takes any folder with a number for the latest step. So: a step counts
only if each of its files has the recorded checksum; the newest such step is taken, with one line on each newer one that
was passed over; and when all steps are damaged it is an error, never a silent start from zero.

A step passes through the host: process 0 writes a copy of every leaf, which need not stay still on the devices while
it does, and every process reads the whole and puts its shards where they belong. So one that was saved on any mesh and
any number of processes is restored on any other; what trains and its optimiser state must fit a host's memory, once.
"""

import logging
import math
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.errors import FlagError, ModelError
from research.peft import tree
from research.train import host, integrity
from research.train.distributed import is_main

PyTree = Any


class Checkpointer:
    """Saves and restores steps below `directory`, keeping the newest `keep` valid ones and, beyond them, the
    `keep_best` with the highest scores.

    One save may be in flight: `check` raises its error, `wait` waits for it first. All processes of a run call the same
    methods in the same order.
    """

    def __init__(self, directory: str | Path, keep: int = 2, keep_best: int = 0):
        if keep < 1:
            raise FlagError(f"keep={keep}: at least one checkpoint must be kept")
        self.directory, self.keep, self.keep_best = Path(directory).absolute(), keep, keep_best
        self._saving: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self, step: int, state: PyTree, meta: dict[str, Any], score: float | None = None, wait: bool = True
    ) -> None:
        """Writes one step and, only when it is complete, deletes old ones. `meta` is JSON; a higher `score` is better.

        With `wait=False` the writing goes on beside whatever comes next; the state is copied before this returns, so
        its buffers may be donated. A save that fails is tried once more. Raises ModelError if it, or the one before,
        cannot be written.
        """
        self.wait()
        leaves = tree.paths(state)
        record = {"step": step, "meta": meta, "score": score}
        record["keys"] = {path: str(jax.random.key_impl(x)) for path, x in leaves.items() if host.is_key(x)}
        copies = host.copies(leaves)
        if is_main():
            self._saving = threading.Thread(target=self._run, args=(record, copies), name=f"save-{step}", daemon=True)
            self._saving.start()
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises what a save in flight has failed with, without waiting for it."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits for the save in flight. Raises ModelError if it failed."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        self.check()

    def close(self) -> None:
        """Waits like `wait`, but only says what went wrong: another error may be on its way already."""
        try:
            self.wait()
        except ModelError as error:
            print(error, file=sys.stderr)

    def latest_step(self) -> int | None:
        """The newest valid step; None if there is no checkpoint at all.

        Raises ModelError if there are some and none is valid. All processes get what process 0 found.
        """
        self.wait()
        return _agree(self._newest() if is_main() else None)

    def best_step(self) -> int | None:
        """The valid step with the highest score; None if no step has one."""
        self.wait()
        return _agree(next(iter(self._best(self._valid())), None) if is_main() else None)

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return integrity.read(self.directory / str(step))["meta"]

    def restore(
        self, step: int, abstract: PyTree, expect: dict[str, Any] | None = None
    ) -> tuple[PyTree, dict[str, Any]]:
        """Returns (state, meta) of a step.

        Args:
            abstract: arrays or ShapeDtypeStructs with the structure of the state; their shardings say where leaves go,
                so another mesh works.
            expect: must be equal to the same keys of the saved meta.
        Raises:
            ModelError: damaged, of another structure, or `expect` differs; the differing names are given.
        """
        self.wait()
        where, folder = f"checkpoint step {step} in {self.directory}", self.directory / str(step)
        if reason := integrity.fault(folder, step):
            raise ModelError(f"{where} is damaged: {reason}")
        record = integrity.read(folder)
        if differ := integrity.differences(expect or {}, record["meta"]):
            raise ModelError(f"{where} is from another run: {integrity.some(differ)}")
        wanted = {path: host.abstract(x) for path, x in tree.paths(abstract).items()}
        saved = record["leaves"]
        wrong = [f"{p} missing" for p in wanted if p not in saved]
        wrong += [f"{p} unexpected" for p in saved if p not in wanted]
        for path in wanted.keys() & saved.keys():
            here = (list(wanted[path].shape), str(wanted[path].dtype))
            there = (saved[path]["shape"], saved[path]["dtype"])
            if here != there:
                wrong.append(f"{path} is {there[1]}{there[0]}, wanted {here[1]}{here[0]}")
        if wrong:
            raise ModelError(f"{where} does not fit: {integrity.some(sorted(wrong))}")
        try:
            leaves = _orbax("restore", folder / "state", wanted)
        except Exception as error:  # Orbax raises anything from KeyError to bare Exception for a damaged folder
            raise ModelError(f"{where} cannot be read: {integrity.first_line(error)}") from error
        if bad := [p for p, x in leaves.items() if integrity.describe(x) != saved[p]]:
            raise ModelError(f"{where} was read with wrong values: {integrity.some(bad)}")
        leaves = {path: host.place(x, wanted[path].sharding) for path, x in leaves.items()}
        for path, impl in record["keys"].items():
            leaves[path] = jax.random.wrap_key_data(leaves[path], impl=impl)
        return tree.map_with_path(lambda path, _: leaves[path], abstract), record["meta"]

    # -------------------------------------------------------------------- process 0 only, and in a thread

    def _run(self, record: dict[str, Any], leaves: dict[str, np.ndarray]) -> None:
        try:
            try:
                self._write(record, leaves)
            except ModelError as error:
                print(f"{error}; trying once more", file=sys.stderr)
                self._write(record, leaves)
        except Exception as error:
            self._error = error

    def _write(self, record: dict[str, Any], leaves: dict[str, np.ndarray]) -> None:
        step = record["step"]
        final, work = self.directory / str(step), self.directory / f".saving-{step}"
        record = record | {"leaves": {path: integrity.describe(x) for path, x in leaves.items()}}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _clear(work)
            work.mkdir()
            _orbax("save", work / "state", leaves)
            integrity.seal(work, record)
            _clear(final)
            work.rename(final)
            integrity.sync_folder(self.directory)
        except (OSError, ValueError, RuntimeError) as error:
            # Orbax and TensorStore report a full disk as any of these.
            raise ModelError(
                f"cannot save step {step} in {self.directory}: {integrity.first_line(error)} "
                f"({_free(self.directory)} bytes free; earlier steps are kept)"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._delete_old(step)

    def _steps(self) -> list[int]:
        """Folders named by a step and not empty, newest first; files, notes and unfinished saves are none."""
        if not self.directory.is_dir():
            return []
        named = [f for f in self.directory.iterdir() if f.name.isdecimal() and f.name == str(int(f.name))]
        return sorted((int(f.name) for f in named if f.is_dir() and any(f.iterdir())), reverse=True)

    def _newest(self) -> int | None:
        self._finish_renames()
        reasons = []
        for step in self._steps():
            reason = integrity.fault(self.directory / str(step), step)
            if reason is None:
                return step
            reasons.append(f"step {step}: {reason}")
            print(f"checkpoint step {step} in {self.directory} is damaged and passed over: {reason}", file=sys.stderr)
        if reasons:
            raise ModelError(
                f"no checkpoint in {self.directory} is valid ({'; '.join(reasons)}); move it away to start over"
            )
        return None

    def _valid(self) -> list[int]:
        return [step for step in self._steps() if integrity.fault(self.directory / str(step), step) is None]

    def _best(self, steps: list[int]) -> list[int]:
        """Those of the steps that have a score, the best first and of equals the newest."""
        scores = {step: integrity.read(self.directory / str(step)).get("score") for step in steps}
        return sorted((s for s in steps if scores[s] is not None), key=lambda s: (-scores[s], -s))

    def _finish_renames(self) -> None:
        """A kill between removing a step and renaming its complete successor leaves only the latter."""
        for work in self.directory.glob(".saving-*"):
            name = work.name.removeprefix(".saving-")
            if name.isdecimal() and not (self.directory / name).exists() and not integrity.fault(work, int(name)):
                work.rename(self.directory / name)

    def _delete_old(self, saved: int) -> None:
        """Steps above the saved one are of a past that did not happen (they were damaged, or the run was set back)."""
        valid = [step for step in self._valid() if step <= saved]
        kept = {saved, *valid[: self.keep], *self._best(valid)[: self.keep_best]}
        for step in self._steps():
            if step not in kept:
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
        for leftover in self.directory.glob(".saving-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _orbax(action: str, path: Path, leaves: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Saves {path: array}, or restores what has these shapes. No other process takes part.

    Leaves without elements, which Orbax refuses, are made anew.
    """
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(me, {me}, f"process-{me}") if jax.process_count() > 1 else None
    options = {} if alone is None else {"multiprocessing_options": alone}
    # Numpy arrays (of one zero, seen many times) are how Orbax is asked for numpy arrays.
    empty = lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape) if action == "restore" else x  # noqa: E731
    full = tree.unflatten({p: empty(x) for p, x in leaves.items() if math.prod(x.shape)})
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs pages for each save; what matters is raised
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(**options), **options) as checkpointer:
            if action == "save":
                return checkpointer.save(path, args=ocp.args.StandardSave(full))
            found = tree.paths(checkpointer.restore(path, args=ocp.args.StandardRestore(full)))
            whole = lambda p, x: found[p] if math.prod(x.shape) else np.zeros(x.shape, x.dtype)  # noqa: E731
            return {p: np.asarray(whole(p, x)) for p, x in leaves.items()}
    finally:
        log.setLevel(level)


def _agree(step: int | None) -> int | None:
    """What process 0 says."""
    if jax.process_count() == 1:
        return step
    from jax.experimental import multihost_utils

    found = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if found < 0 else found


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
