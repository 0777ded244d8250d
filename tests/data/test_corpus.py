import struct
import zlib

import pytest

from research.data import corpus
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


def test_a_kept_file_is_checked_and_a_missing_apt_is_named(tmp_path, monkeypatch):
    content = b"text"
    file = corpus.DebianFile("some-package", "1", "usr/share/text", corpus._sha256(content))
    kept = tmp_path / "assets" / "some-package-1" / "text"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    assert corpus.debian_file(file, tmp_path) == content
    kept.write_bytes(b"texd")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="some-package=1 needs apt-get, which this system lacks"):
        corpus.debian_file(file, tmp_path)
    monkeypatch.setattr(corpus, "_download", lambda file: b"altered")
    with pytest.raises(DataError, match="expected .* not kept"):
        corpus.debian_file(file, tmp_path)
    monkeypatch.setattr(corpus, "_download", lambda file: content)
    assert corpus.debian_file(file, tmp_path) == content == kept.read_bytes()


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
