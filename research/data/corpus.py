"""Plain text to pretrain on: Jane Austen's six novels, Chinese poems, Wikipedia articles, or one's own file.

    austen   Debian's r-cran-janeaustenr (MIT): six novels, whole ones held out
    poems    Debian's fortunes-zh: 唐诗三百首 and a hundred Song poems, by the hash of a poem
    wiki     30 English articles of the llamafactory sdist, by the hash of an article
    PATH     a text file; blank lines divide its documents, by the hash of a document

A Debian package is fetched with `apt-get download` and unpacked with `dpkg-deb`, not installed: no R comes with
it. Every use checks the digest of the file that is read.
"""

import hashlib
import io
import os
import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from research.data.assets import cache_dir, fetch
from research.data.text import PARTS, split_of
from research.errors import DataError, did_you_mean
from research.files import write_bytes

PACKAGED = ("austen", "poems", "wiki")
HELD_OUT = {"PERSUASION": "validation", "NORTHANGER ABBEY": "test"}  # the two shortest novels


@dataclass(frozen=True)
class DebianFile:
    """One file of one version of a Debian package, with its sha256."""

    package: str
    version: str
    path: str
    sha256: str


AUSTEN = DebianFile(
    "r-cran-janeaustenr",
    "1.0.0-1",
    "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21",
)
POEMS = tuple(
    DebianFile("fortunes-zh", "2.98", f"usr/share/games/fortunes/{name}", sha256)
    for name, sha256 in {
        "tang300": "b69cab0cb84c49dc1808d95aea7156c8911a7022ec630e194eecf360b78feff5",
        "song100": "05a0af125f3572b895e06046c417df0f8f1b8cb9cf0b5115ee9420ae5524683b",
    }.items()
)


def load(source: str, *, cache: str | os.PathLike | None = None) -> dict[str, tuple[str, ...]]:
    """Returns {"train", "validation", "test"} -> documents.

    Raises DataError: an unknown source, a package that cannot be fetched, a file that is no text, an empty part.
    """
    if source == "austen":
        documents = novels(debian_file(AUSTEN, cache))
        placed = [(HELD_OUT.get(text.partition("\n")[0].strip().upper(), "train"), text) for text in documents]
    elif source == "poems":
        texts = (poem for file in POEMS for poem in fortunes(debian_file(file, cache).decode()))
        placed = [(split_of(text), text) for text in dict.fromkeys(texts)]
    elif source == "wiki":
        lines = (fetch("llamafactory", cache) / "wiki_demo.txt").read_text("utf-8").splitlines()
        placed = [(split_of(text), text) for text in dict.fromkeys(line.strip() for line in lines) if text]
    else:
        placed = [(split_of(text), text) for text in dict.fromkeys(_file(source))]
    parts = {part: tuple(text for place, text in placed if place == part) for part in reversed(PARTS)}
    empty = [part for part, texts in parts.items() if not texts]
    if empty:
        raise DataError(f"{source}: the {empty[0]} part is empty; {len(placed)} documents are too few to split")
    return parts


def _file(source: str) -> list[str]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"{source!r} is no text file and no packaged corpus.{did_you_mean(source, PACKAGED)}")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    return [document.strip() for document in re.split(r"\n\s*\n", text) if document.strip()]


def novels(database: bytes) -> list[str]:
    """Returns the character vectors of an R lazy-load database, the lines of each joined.

    A block is a big-endian length and a zlib stream; in it R's serialisation, format 3: a header of 23 bytes, the type
    (16, a character vector), a count, and for every string its type, its length (-1 for NA) and its bytes.
    """
    texts, place = [], 0
    try:
        while place < len(database):
            stream = zlib.decompressobj()
            block = stream.decompress(database[place + 4 :])
            place = len(database) - len(stream.unused_data)
            kind, count = struct.unpack_from(">ii", block, 23)
            if kind & 0xFF != 16:
                continue
            lines, at = [], 31
            for _ in range(count):
                (size,) = struct.unpack_from(">i", block, at + 4)
                lines.append(block[at + 8 : at + 8 + max(size, 0)].decode())
                at += 8 + max(size, 0)
            texts.append("\n".join(lines))
    except (zlib.error, struct.error, UnicodeDecodeError) as error:
        raise DataError(f"the novels are no R database that is understood: {error}") from error
    return texts


def fortunes(text: str) -> list[str]:
    """Returns the entries of a fortune file, without terminal colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [entry.strip() for entry in re.split(r"^%\s*$", plain, flags=re.MULTILINE) if entry.strip()]


def debian_file(file: DebianFile, cache: str | os.PathLike | None = None) -> bytes:
    """Returns the content of a packaged file, from the cache or through apt. Raises DataError."""
    kept = cache_dir(cache) / "assets" / f"{file.package}-{file.version}" / Path(file.path).name
    if kept.is_file() and _sha256(content := kept.read_bytes()) == file.sha256:
        return content
    content = _download(file)
    found = _sha256(content)
    if found != file.sha256:
        raise DataError(f"{file.path} of {file.package} has sha256 {found[:12]}, expected {file.sha256[:12]}: not kept")
    write_bytes(kept, content)
    return content


def _download(file: DebianFile) -> bytes:
    by_hand = f"Fetch it on a Debian system, or name a text file instead of the packaged corpus ({', '.join(PACKAGED)})"
    wanted = f"{file.package}={file.version}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            for command in (["apt-get", "download", wanted], ["dpkg-deb", "--fsys-tarfile"]):
                archives = [str(path) for path in Path(folder).glob("*.deb")]
                done = subprocess.run([*command, *archives], cwd=folder, capture_output=True, check=True)
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
                return tar.extractfile(f"./{file.path}").read()
        except FileNotFoundError as error:
            raise DataError(f"{wanted} needs {error.filename}, which this system lacks. {by_hand}") from error
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip().splitlines() or [f"status {error.returncode}"]
            raise DataError(f"{error.cmd[0]} could not fetch {wanted}: {said[-1]}. {by_hand}") from error
        except (KeyError, AttributeError, tarfile.TarError) as error:
            raise DataError(f"{wanted} does not hold {file.path}: {error}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
