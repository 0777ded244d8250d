import hashlib
import io
import os
import struct
import tarfile
import zlib

import pytest

from research.data import assets, corpus
from research.data.pins import Asset
from research.errors import DataError


def r_database(*vectors):
    """Blocks as R writes them: character vectors in serialisation format 3."""
    blocks = []
    for lines in vectors:
        body = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
        for line in lines:
            body += struct.pack(">i", 0x40009) + (
                struct.pack(">i", -1) if line is None else struct.pack(">i", len(line.encode())) + line.encode()
            )
        blocks.append(struct.pack(">I", len(body)) + zlib.compress(body))
    return b"".join(blocks)


def test_novels_are_read_out_of_an_r_database():
    assert corpus.novels(r_database(["EMMA", "", "naïve"], ["PERSUASION", None, "x"])) == [
        "EMMA\n\nnaïve",
        "PERSUASION\n\nx",
    ]
    with pytest.raises(DataError, match="no R database"):
        corpus.novels(b"1234 not zlib")


def test_fortunes_lose_their_colours():
    assert corpus.fortunes("\x1b[32m《诗》\x1b[m\n一句。\n%\n二句。\n%\n") == ["《诗》\n一句。", "二句。"]


def test_a_file_is_split_by_document_without_repeats(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join(f"document {n % 150}\nline" for n in range(300)))
    parts = corpus.load(str(path))
    assert sum(map(len, parts.values())) == len({text for texts in parts.values() for text in texts}) == 150
    path.write_text("one document")
    with pytest.raises(DataError, match="part is empty; 1 documents"):
        corpus.load(str(path))
    with pytest.raises(DataError, match="Did you mean 'austen'"):
        corpus.load("austin")


def tool(folder, name, body):
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_kept_file_is_checked_and_a_missing_apt_is_named(tmp_path, monkeypatch):
    """A tar stands for the Debian package, and two scripts for the tools."""
    content, plain = b"text", io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        member = tarfile.TarInfo("./usr/share/text")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    package = plain.getvalue()
    digest = lambda x: hashlib.sha256(x).hexdigest()  # noqa: E731
    asset = Asset(
        "own", "some-package", "1", "deb", "some-package_1_all.deb", len(package), digest(package), "usr/share",
        {"text": (4, digest(content))}, "", error=DataError,
    )  # fmt: skip
    monkeypatch.setitem(assets.ASSETS, "own", asset)
    tools, offered, cache = tmp_path / "tools", tmp_path / "offered.deb", tmp_path / "cache"
    tools.mkdir()
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(DataError, match="own is a Debian package, and this system has no apt-get"):
        assets.fetch("own", cache)
    monkeypatch.setenv("PATH", f"{tools}:{path}")
    tool(tools, "apt-get", f"cp {offered} {asset.archive}")
    tool(tools, "dpkg-deb", 'cat "$2"')
    offered.write_bytes(package[:-1] + b"x")
    with pytest.raises(DataError, match="expected .* Nothing was kept"):
        assets.fetch("own", cache)
    offered.write_bytes(package)
    kept = assets.fetch("own", cache) / "text"
    assert kept.read_bytes() == content
    kept.write_bytes(b"texd")
    assert (assets.fetch("own", cache) / "text").read_bytes() == content == kept.read_bytes()
    tool(tools, "apt-get", "echo 'E: no such version'; exit 100")
    (cache / "downloads" / asset.archive).unlink()
    kept.unlink()
    with pytest.raises(DataError, match="apt could not download some-package.*: no such version"):
        assets.fetch("own", cache)


@pytest.mark.assets
@pytest.mark.slow
def test_the_packaged_corpora_are_whole():
    austen = corpus.load("austen")
    assert {part: len(texts) for part, texts in austen.items()} == {"train": 4, "validation": 1, "test": 1}
    assert 4.0e6 < sum(len(text.encode()) for texts in austen.values() for text in texts) < 4.6e6
    assert "truth universally acknowledged" in "".join(austen["train"])
    assert sum(map(len, corpus.load("wiki").values())) == 30
    poems = corpus.load("poems")
    assert 400 < sum(map(len, poems.values())) <= 420
    assert "\x1b" not in "".join(poems["train"])
