"""Labelled sentences from packaged sets, local files and hub data sets, with a split that depends on the text alone.

A text belongs to test, validation or train by a hash of itself (a tenth, a tenth, the rest): the same on every machine,
in every order and every subset. A source with parts of its own keeps them; what it lacks is cut from train by that
hash. A text that occurs twice is kept once, in test before validation before train.
"""

import ast
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from research.data import rows
from research.data.assets import fetch
from research.data.rows import SUFFIXES, Row
from research.errors import DataError, did_you_mean

VADER = {
    "vader/movie": "movieReviewSnippets",
    "vader/amazon": "amazonReviewSnippets",
    "vader/nyt": "nytEditorialSnippets",
    "vader/tweets": "tweets",
}
PACKAGED = (*VADER, "smoke")
PARTS = ("test", "validation", "train")  # in the order in which they keep a text they share


@dataclass(frozen=True, eq=False)
class Examples:
    """N texts, their class numbers labels [N] int32, and the classes' names; `name` says where they come from."""

    texts: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any text, label or class name, and with their order."""
        content = json.dumps([self.texts, self.labels.tolist(), self.class_names])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Splits:
    """The three parts of a source, and notes worth printing (how many texts were dropped)."""

    train: Examples
    validation: Examples
    test: Examples
    notes: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names


def split_of(text: str) -> str:
    """Returns the part a text belongs to: "test" or "validation", a tenth each, or "train"."""
    digit = int(hashlib.sha256(_key(text).encode()).hexdigest(), 16) % 10
    return PARTS[min(digit, 2)]


def load(
    source: str,
    *,
    cache: str | os.PathLike | None = None,
    text_column: str = "text",
    label_column: str = "label",
    threshold: float = 0.5,
    class_names: Sequence[str] | None = None,
) -> Splits:
    """Loads a labelled source and splits it.

    Args:
      source: `vader/movie`, `vader/amazon`, `vader/nyt`, `vader/tweets`; `smoke` (bundled); a .jsonl, .json, .csv, .tsv
        or .parquet file; a folder of such files named train, validation, test; a hub data set `id[:config][@revision]`.
      cache: where packaged sets are kept (see `assets.cache_dir`).
      text_column, label_column: columns of files and hub data sets; labels are integers or strings.
      threshold: VADER sentences with a mean rating (-4 to 4) nearer to 0 than this are left out.
      class_names: the only labels allowed, in the order of their numbers. Default: those found, sorted.

    Raises:
      DataError: an unknown source, an unreadable file, a broken row (`file:line: ...`), a single class, an empty part.
    """
    columns, path = (text_column, label_column), Path(source).expanduser()
    if source == "smoke":
        from research.data import smoke

        names, parts = smoke.CLASS_NAMES, {None: (Row(text, label, "smoke") for text, label in smoke.sentences())}
    elif source.partition("/")[0] == "vader":
        names, parts = ("negative", "positive"), {None: _vader(source, threshold, cache)}
    elif path.is_dir():
        names, parts = None, _folder(path, columns)
    elif path.suffix in SUFFIXES or path.is_file():
        names, parts = None, {None: rows.read(path, *columns)}
    else:
        names, parts = _hub(source, columns)
    return _assemble(source, parts, tuple(class_names or names or ()))


def ratings(source: str, *, cache: str | os.PathLike | None = None) -> list[tuple[str, np.ndarray]]:
    """Returns every text of a VADER set (`vader/movie`, ...) with its raters' scores [raters] int32, each -4 to 4."""
    truth = _tabbed(_vader_file(source, "GroundTruth", cache))
    raters = _tabbed(_vader_file(source, "anonDataRatings", cache))
    scores = {key: np.asarray(ast.literal_eval(found), np.int32) for key, _, _, found in raters}
    return [(text, scores[key]) for key, _, text in truth]


def _vader(source: str, threshold: float, cache: str | os.PathLike | None) -> Iterator[Row]:
    """Drops repeated texts before the threshold does: of two means for one text the first counts."""
    path, seen = _vader_file(source, "GroundTruth", cache), set()
    for line, (_, mean, text) in enumerate(_tabbed(path), 1):
        if _key(text) not in seen and abs(float(mean)) >= threshold:
            yield Row(text.strip(), "positive" if float(mean) > 0 else "negative", f"{path}:{line}")
        seen.add(_key(text))


def _vader_file(source: str, kind: str, cache: str | os.PathLike | None) -> Path:
    if source not in VADER:
        raise DataError(f"unknown data set {source!r}.{did_you_mean(source, PACKAGED)}")
    return fetch("vader", cache) / f"{VADER[source]}_{kind}.txt"


def _tabbed(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return [line.rstrip("\n").split("\t") for line in file if line.strip()]


def _folder(path: Path, columns: tuple[str, str]) -> dict[str, Iterator[Row]]:
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.stem in PARTS}
    if "train" not in files:
        raise DataError(f"{path}: no train file in this folder. Valid: {', '.join('train' + s for s in SUFFIXES)}.")
    return {part: rows.read(file, *columns) for part, file in files.items()}


def _hub(source: str, columns: tuple[str, str]) -> tuple[list[str] | None, dict[str, list[Row]]]:
    """Reads a hub data set; returns its class names, if its features tell them, and its parts."""
    if difflib.get_close_matches(source, PACKAGED, n=1, cutoff=0.8):  # a slip of the pen: no half minute of retries
        raise DataError(f"unknown data set {source!r}.{did_you_mean(source, PACKAGED)}")
    loaded = rows.hub(source, did_you_mean(source, PACKAGED))
    names, parts = None, {}
    for part in PARTS:
        if part not in loaded:
            continue
        data, where = loaded[part], f"{source} [{part}]"
        rows.require(columns, data.column_names, where)
        texts, labels = data[columns[0]][:], data[columns[1]][:]
        if set(labels) == {-1}:  # benchmarks hide the labels of their test part so
            continue
        names = getattr(data.features[columns[1]], "names", None)
        pairs = zip(texts, labels, strict=True)
        parts[part] = [Row.of(text, label, f"{where}: row {row}") for row, (text, label) in enumerate(pairs, 1)]
    if "train" not in parts:
        raise DataError(f"{source}: no train part, found {', '.join(loaded)}")
    return names, parts


def _assemble(source: str, parts: Mapping[str | None, Iterable[Row]], names: tuple[str, ...]) -> Splits:
    """Drops repeated texts, fills the three parts and numbers the labels. Part None stands for an unsplit source."""
    kept, places, seen, learnt, dropped = [], [], set(), [], 0
    for part in sorted(parts, key=lambda part: PARTS.index(part or "train")):
        for row in parts[part]:
            if _key(row.text) in seen:
                dropped += 1
                continue
            seen.add(_key(row.text))
            cut = split_of(row.text)
            kept.append(row)
            places.append(cut if part in (None, "train") and cut not in parts else part)
            if part in (None, "train"):
                learnt.append(row)
    if not learnt:
        raise DataError(f"{source}: no rows")
    names = names or _class_names(source, learnt)
    labels = np.asarray([_number(row, names) for row in kept], np.int32)
    if len({row.label for row in learnt}) < 2:
        raise DataError(f"{source}: every row has the label {learnt[0].label!r}; two classes are needed")
    examples = {}
    for part in PARTS:
        chosen = [number for number, place in enumerate(places) if place == part]
        if not chosen:
            raise DataError(f"{source}: the {part} part is empty; {len(kept)} distinct texts are too few to split")
        texts = tuple(kept[number].text for number in chosen)
        examples[part] = Examples(texts, labels[chosen], names, f"{source} [{part}]")
    if len(np.unique(examples["train"].labels)) < 2:
        raise DataError(f"{source}: the train part has one class only; there are too few rows of another")
    return Splits(**examples, notes=(f"{source}: {dropped} repeated texts dropped",) if dropped else ())


def _class_names(source: str, found: Sequence[Row]) -> tuple[str, ...]:
    """Returns the labels found, sorted: numbers by value, words by letter. Raises DataError if they are no classes."""
    for row in found:
        if type(row.label) is not type(found[0].label):
            raise DataError(f"{row.where}: label {row.label!r} beside {found[0].label!r}: numbers and words are mixed")
    labels = sorted({row.label for row in found})
    if len(labels) > max(20, len(found) // 2):
        raise DataError(f"{source}: {len(labels)} different labels in {len(found)} rows are no classes")
    return tuple(map(str, labels))


def _number(row: Row, names: tuple[str, ...]) -> int:
    if str(row.label) in names:
        return names.index(str(row.label))
    if isinstance(row.label, int) and 0 <= row.label < len(names):
        return row.label
    raise DataError(f"{row.where}: unknown label {row.label!r}.{did_you_mean(str(row.label), names)}")


def _key(text: str) -> str:
    """What of a text decides its part and whether it repeats another."""
    return text.strip().lower()
