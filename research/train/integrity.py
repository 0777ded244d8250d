"""What makes a saved folder trustworthy: every byte forced to the disk and its checksum written down, last of all.

integrity.json    {"step": ..., "leaves": {path: shape, dtype, crc32}, "files": {name: [size, crc32]}, ...,
                   "digest": of all of this}
"""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

NAME = "integrity.json"


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Forces what is in a folder to the disk and writes the record, with the checksums of all files, beside it."""
    files = {str(f.relative_to(folder)): _sync(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    record = record | {"files": files}
    with open(folder / NAME, "w") as f:
        f.write(json.dumps(record | {"digest": _digest(record)}, indent=1))
        f.flush()
        os.fsync(f.fileno())
    sync_folder(folder)


def read(folder: Path) -> dict[str, Any]:
    """The record of a sealed folder."""
    return json.loads((folder / NAME).read_text())


def fault(folder: Path, step: int) -> str | None:
    """Why a folder cannot be trusted to be what was saved as `step`; None if it can."""
    try:
        record = read(folder)
        if record.pop("digest") != _digest(record) or record["step"] != step:
            return f"{NAME} was altered"
        for name, (size, crc) in record["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, not {size}"
            if _crc(file) != crc:
                return f"{name} has a wrong checksum"
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read ({first_line(error)})"
    return None


def describe(x: np.ndarray) -> dict[str, Any]:
    """What a leaf must come back as."""
    plain = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return {"shape": list(x.shape), "dtype": str(x.dtype), "crc32": zlib.crc32(plain)}


def sync_folder(folder: Path) -> None:
    """Forces a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def some(names: list[str], most: int = 10) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def differences(expect: Any, found: Any, path: str = "") -> list[str]:
    """One line on each leaf of nested dicts that differs, both sides through JSON."""
    expect = json.loads(json.dumps(expect))
    if isinstance(expect, dict) and isinstance(found, dict):
        names = expect if not path else sorted({*expect, *found})
        pairs = [(k, expect.get(k), found.get(k)) for k in names]
        return [line for k, a, b in pairs for line in differences(a, b, f"{path}/{k}".strip("/"))]
    return [] if expect == found else [f"{path} is {found!r} there and {expect!r} here"]


def _digest(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


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
    sync_folder(file.parent)
    return file.stat().st_size, _crc(file)
