"""Plain text to pretrain on: Jane Austen's six novels, Chinese poems, Wikipedia articles, or one's own file.

    austen   Debian's r-cran-janeaustenr (MIT): six novels, whole ones held out
    poems    Debian's fortunes-zh: 唐诗三百首 and a hundred Song poems, by the hash of a poem
    wiki     30 English articles of the llamafactory sdist, by the hash of an article
    PATH     a text file; blank lines divide its documents, by the hash of a document

A Debian package is fetched and unpacked, not installed: no R comes with it.
"""

import os
import re
import struct
import zlib
from pathlib import Path

from research.data.assets import fetch
from research.data.text import PARTS, split_of
from research.errors import DataError, did_you_mean

PACKAGED = ("austen", "poems", "wiki")
HELD_OUT = {"PERSUASION": "validation", "NORTHANGER ABBEY": "test"}  # the two shortest novels


def load(source: str, *, cache: str | os.PathLike | None = None) -> dict[str, tuple[str, ...]]:
    """Returns {"train", "validation", "test"} -> documents.

    Raises DataError: an unknown source, a package that cannot be fetched, a file that is no text, an empty part.
    """
    if source == "austen":
        documents = novels((fetch("austen", cache) / "Rdata.rdb").read_bytes())
        placed = [(HELD_OUT.get(text.partition("\n")[0].strip().upper(), "train"), text) for text in documents]
    elif source == "poems":
        files = (fetch("poems", cache) / name for name in ("tang300", "song100"))
        texts = (poem for file in files for poem in fortunes(file.read_text("utf-8")))
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
