"""Checkpoints that are whole, checked and chosen by us. The only file that knows Orbax.

    DIRECTORY/120/state/...         Orbax: {"step": ..., "trainable": {...}, "opt_state": {...}, "rng": key data}
    DIRECTORY/120/integrity.json    written last: checksums of all leaves and files, shapes, dtypes, the caller's meta
    DIRECTORY/.saving-120/...       a save under way; renamed to 120 when complete: a killed save leaves no step behind

Orbax alone restores a flipped bit silently and takes any folder with a number for the latest step. So: a step counts
only if each of its files has the recorded checksum; the newest such step is taken, with one line on each newer one that
was passed over; and when all steps are damaged it is an error, never a silent start from zero.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError, ModelError
from research.peft import tree

PyTree = Any
INTEGRITY = "integrity.json"


class Checkpointer:
    """Saves and restores steps below `directory`, keeping the newest `keep` valid ones."""

    def __init__(self, directory: str | Path, keep: int = 2):
        if keep < 1:
            raise FlagError(f"keep={keep}: at least one checkpoint must be kept")
        self.directory, self.keep = Path(directory).absolute(), keep

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Writes one step and, only when it is complete, deletes old ones. `meta` is JSON.

        Raises ModelError if it cannot be written.
        """
        final, work = self.directory / str(step), self.directory / f".saving-{step}"
        leaves = {path: _plain(x) for path, x in tree.paths(state).items()}
        record = {"step": step, "leaves": {path: _describe(x) for path, x in leaves.items()}, "meta": meta}
        record["keys"] = {path: str(jax.random.key_impl(x)) for path, x in tree.paths(state).items() if _is_key(x)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _clear(work)
            work.mkdir()
            _orbax("save", work / "state", leaves)
            record["files"] = {str(f.relative_to(work)): _sync(f) for f in _files(work)}
            _write(work / INTEGRITY, json.dumps(record | {"digest": _digest(record)}, indent=1))
            _clear(final)
            work.rename(final)
            _sync_folder(self.directory)
        except (OSError, ValueError, RuntimeError) as error:
            # Orbax and TensorStore report a full disk as any of these.
            raise ModelError(
                f"cannot save step {step} in {self.directory}: {_first_line(error)} "
                f"({_free(self.directory)} bytes free; earlier steps are kept)"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._delete_old(step)

    def latest_step(self) -> int | None:
        """The newest valid step; None if there is no checkpoint at all.

        Raises ModelError if there are some and none is valid.
        """
        self._finish_renames()
        reasons = []
        for step in sorted(self._steps(), reverse=True):
            reason = self._fault(step)
            if reason is None:
                return step
            reasons.append(f"step {step}: {reason}")
            print(f"checkpoint step {step} in {self.directory} is damaged and passed over: {reason}", file=sys.stderr)
        if reasons:
            raise ModelError(
                f"no checkpoint in {self.directory} is valid ({'; '.join(reasons)}); move it away to start over"
            )
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return self._record(step)["meta"]

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
        where = f"checkpoint step {step} in {self.directory}"
        if reason := self._fault(step):
            raise ModelError(f"{where} is damaged: {reason}")
        record = self._record(step)
        if differ := _differences(expect or {}, record["meta"]):
            raise ModelError(f"{where} is from another run: {_some(differ)}")
        wanted = {path: _abstract(x) for path, x in tree.paths(abstract).items()}
        saved = record["leaves"]
        wrong = [f"{p} missing" for p in wanted if p not in saved] + [
            f"{p} unexpected" for p in saved if p not in wanted
        ]
        for path in wanted.keys() & saved.keys():
            here, there = (
                (list(wanted[path].shape), str(wanted[path].dtype)),
                (saved[path]["shape"], saved[path]["dtype"]),
            )
            if here != there:
                wrong.append(f"{path} is {there[1]}{there[0]}, wanted {here[1]}{here[0]}")
        if wrong:
            raise ModelError(f"{where} does not fit: {_some(sorted(wrong))}")
        try:
            leaves = _orbax("restore", self.directory / str(step) / "state", wanted)
        except Exception as error:  # Orbax raises anything from KeyError to bare Exception for a damaged folder
            raise ModelError(f"{where} cannot be read: {_first_line(error)}") from error
        if bad := [p for p, x in leaves.items() if _describe(x) != saved[p]]:
            raise ModelError(f"{where} was read with wrong values: {_some(bad)}")
        for path, impl in record["keys"].items():
            leaves[path] = jax.random.wrap_key_data(leaves[path], impl=impl)
        return tree.map_with_path(lambda path, _: leaves[path], abstract), record["meta"]

    def _steps(self) -> list[int]:
        """Folders named by a number and not empty; files, notes and unfinished saves are not checkpoints."""
        if not self.directory.is_dir():
            return []
        return [int(f.name) for f in self.directory.iterdir() if f.name.isdecimal() and f.is_dir() and any(f.iterdir())]

    def _record(self, step: int) -> dict[str, Any]:
        return json.loads((self.directory / str(step) / INTEGRITY).read_text())

    def _finish_renames(self) -> None:
        """A kill between removing a step and renaming its complete successor leaves only the latter."""
        for work in self.directory.glob(".saving-*"):
            name = work.name.removeprefix(".saving-")
            if name.isdecimal() and not (self.directory / name).exists() and self._fault(int(name), work) is None:
                work.rename(self.directory / name)

    def _fault(self, step: int, folder: Path | None = None) -> str | None:
        """Why a step cannot be trusted; None if it can."""
        folder = folder or self.directory / str(step)
        try:
            record = json.loads((folder / INTEGRITY).read_text())
            if record.pop("digest") != _digest(record) or record["step"] != step:
                return f"{INTEGRITY} was altered"
            for name, (size, crc) in record["files"].items():
                file = folder / name
                if not file.is_file():
                    return f"{name} is missing"
                if file.stat().st_size != size:
                    return f"{name} has {file.stat().st_size} bytes, not {size}"
                if _crc(file) != crc:
                    return f"{name} has a wrong checksum"
        except FileNotFoundError:
            return f"{INTEGRITY} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{INTEGRITY} cannot be read ({_first_line(error)})"
        return None

    def _delete_old(self, saved: int) -> None:
        """Steps above the saved one are of a past that did not happen (they were damaged, or the run was set back)."""
        older = sorted((s for s in self._steps() if s < saved), reverse=True)
        valid = [s for s in older if self._fault(s) is None][: self.keep - 1]
        for step in self._steps():
            if step != saved and step not in valid:
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
        for leftover in self.directory.glob(".saving-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _orbax(action: str, path: Path, leaves: dict[str, Any]) -> dict[str, jax.Array] | None:
    """Saves {path: array}, or restores {path: shape and sharding}.

    Leaves without elements, which Orbax refuses, are made anew.
    """
    import orbax.checkpoint as ocp

    full = tree.unflatten({p: x for p, x in leaves.items() if math.prod(x.shape)})
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs pages for each save; what matters is raised
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            if action == "save":
                return checkpointer.save(path, args=ocp.args.StandardSave(full))
            found = tree.paths(checkpointer.restore(path, args=ocp.args.StandardRestore(full)))
            return {p: found[p] if math.prod(x.shape) else jnp.zeros(x.shape, x.dtype) for p, x in leaves.items()}
    finally:
        log.setLevel(level)


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> jax.Array:
    return jax.random.key_data(x) if _is_key(x) else jnp.asarray(x)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    plain = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    # Where it is not known, the first device. A key's own sharding, always replicated, is that of its data too.
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _describe(x: Any) -> dict[str, Any]:
    host = np.ascontiguousarray(jax.device_get(x))
    return {"shape": list(x.shape), "dtype": str(x.dtype), "crc32": zlib.crc32(host.reshape(-1).view(np.uint8))}


def _digest(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _crc(file: Path) -> int:
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _sync(file: Path) -> tuple[int, int]:
    """Forces a file to the disk; returns (size, crc32)."""
    with open(file, "rb") as f:
        os.fsync(f.fileno())
    _sync_folder(file.parent)
    return file.stat().st_size, _crc(file)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(file: Path, text: str) -> None:
    with open(file, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    _sync_folder(file.parent)


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _differences(expect: Any, found: Any, path: str = "") -> list[str]:
    """Names the leaves of nested dicts that differ, both sides through JSON."""
    expect = json.loads(json.dumps(expect))
    if isinstance(expect, dict) and isinstance(found, dict):
        names = expect if not path else sorted({*expect, *found})
        pairs = [(k, expect.get(k), found.get(k)) for k in names]
        return [line for k, a, b in pairs for line in _differences(a, b, f"{path}/{k}".strip("/"))]
    return [] if expect == found else [f"{path} is {found!r} there and {expect!r} here"]
