"""Rows of text and label out of JSON lines, JSON, CSV, TSV and Parquet files, each row with the place it came from."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.errors import DataError, did_you_mean

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Row:
    """A checked text, its label as written (digits become an int), and `where` it stands ("file:line"), for errors."""

    text: str
    label: int | str
    where: str

    @classmethod
    def of(cls, text: object, label: object, where: str) -> "Row":
        """Returns the row. Raises DataError for a text or label of the wrong type, an empty one or null."""
        return cls(_text(text, where), _label(label, where), where)


def read(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    """Yields the rows of a file. Raises DataError with `file:line`, or `file: row N` where lines have no meaning."""
    try:
        yield from _read(path, text_column, label_column)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from error


def _read(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    if not path.is_file():
        folder = path.parent.iterdir() if path.parent.is_dir() else ()
        near = [file.name for file in folder if file.suffix in SUFFIXES]
        raise DataError(f"data file {path} does not exist.{did_you_mean(path.name, near)}")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of data file. Valid: {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if path.suffix == ".parquet":
        records = _parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        records = _table(path, "," if path.suffix == ".csv" else "\t")
    else:
        records = json_records(path)
    for where, record in records:
        if not isinstance(record, Mapping):
            example = json.dumps({text_column: "...", label_column: 1})
            raise DataError(f"{where}: expected an object like {example}, found {type(record).__name__}")
        require((text_column, label_column), list(record), where)
        yield Row.of(record[text_column], record[label_column], where)


def require(columns: Sequence[str], found: Sequence[str], where: str) -> None:
    """Raises DataError naming what was found and expected, unless every one of `columns` is among `found`."""
    for column in columns:
        if column not in found:
            names = ", ".join(found) or "none"
            raise DataError(f"{where}: no column {column!r}; expected {' and '.join(columns)}, found {names}")


def _text(text: object, where: str) -> str:
    if not isinstance(text, str):
        kind = "null" if text is None else f"{type(text).__name__} {str(text)[:40]!r}"
        raise DataError(f"{where}: the text is {kind}, expected a string")
    if not text.strip():
        raise DataError(f"{where}: the text is empty")
    if re.search("[\ud800-\udfff]", text):
        raise DataError(f"{where}: the text holds half of a surrogate pair (a broken \\u escape)")
    return text.strip()


def _label(label: object, where: str) -> int | str:
    if isinstance(label, bool | int):
        return int(label)
    if not isinstance(label, str):
        kind = "null" if label is None else f"{type(label).__name__} {str(label)[:40]!r}"
        raise DataError(f"{where}: the label is {kind}, expected an integer or a string")
    if not label.strip():
        raise DataError(f"{where}: the label is empty")
    return int(label) if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", label) else label.strip()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                packed = number == 1 and line.startswith((b"\x1f\x8b", b"PK\x03\x04"))
                reason = "a compressed file" if packed else f"not UTF-8 text (byte {error.start + 1} of the line)"
                raise DataError(f"{path}:{number}: {reason}") from error


def hub(source: str, near: str, **options: Any) -> Any:
    """What `datasets` has under "name[:config][@revision]". DataError, ending with `near`, where it has nothing."""
    name, _, revision = source.partition("@")
    name, _, config = name.partition(":")
    try:
        import datasets

        return datasets.load_dataset(name, config or None, revision=revision or None, **options)
    except Exception as error:  # a dozen types, several of them for a missing network alone
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source!r} is no file, and not readable as a hub data set ({reason}). Packaged ones need no hub.{near}"
        ) from error


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """Objects one a line, or one array of objects."""
    lines = list(_lines(path))
    text = "".join(line for _, line in lines)
    if text.lstrip().startswith("["):
        yield from ((f"{path}: row {row}", record) for row, record in enumerate(_parse(path, 1, text), 1))
        return
    for number, line in lines:
        if line.strip():
            yield f"{path}:{number}", _parse(path, number, line.rstrip())


def _parse(path: Path, line: int, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        near = f"{error.msg} at column {error.colno}"
        raise DataError(f"{path}:{line + error.doc.count(chr(10), 0, error.pos)}: broken JSON: {near}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets thousands deep
        raise DataError(f"{path}:{line}: broken JSON: {str(error).splitlines()[0]}") from error


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header = None
    try:
        for cells in reader:
            if header is None:
                header = [cell.strip() for cell in cells]
            elif cells:  # a blank line has none
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise DataError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken row: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a sound Parquet file: {str(error).splitlines()[0]}") from error
    yield from ((f"{path}: row {number}", record) for number, record in enumerate(rows, 1))
