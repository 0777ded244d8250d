import errno
import hashlib
import json

import numpy as np
import pytest

from research.data import text
from research.errors import DataError


def rows(count: int = 60) -> list[dict]:
    return [{"text": f"sentence number {n}", "label": n % 2} for n in range(count)]


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def everything(splits: text.Splits) -> dict[str, str]:
    parts = (splits.train, splits.validation, splits.test)
    return {t: p.class_names[n] for p in parts for t, n in zip(p.texts, p.labels.tolist(), strict=True)}


@pytest.mark.parametrize(
    "sentence, part", [("I liked it.", "train"), ("The soup was cold", "validation"), ("so-so", "test")]
)
def test_the_split_of_a_text_never_changes(sentence, part):
    assert text.split_of(sentence) == text.split_of(f"  {sentence.upper()}\n") == part
    digit = int(hashlib.sha256(sentence.lower().encode()).hexdigest(), 16) % 10
    assert part == {0: "test", 1: "validation"}.get(digit, "train")


def test_all_file_kinds_give_the_same_splits(tmp_path):
    import pyarrow
    import pyarrow.parquet

    data = rows()
    data[3]["text"] = 'with "quotes", a comma\tand tab'
    paths = [write(tmp_path / "a.jsonl", data)]
    (tmp_path / "b.json").write_text(json.dumps(data, indent=1))
    for name, mark in (("c.csv", ","), ("d.tsv", "\t")):
        cells = [[json.dumps(r["text"]).replace('\\"', '""').replace("\\t", "\t"), str(r["label"])] for r in data]
        (tmp_path / name).write_text("\r\n".join(mark.join(row) for row in [["text", "label"], *cells]), "utf-8-sig")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "e.parquet")
    paths += [str(tmp_path / name) for name in ("b.json", "c.csv", "d.tsv", "e.parquet")]
    first = text.load(paths[0])
    assert everything(first) == {r["text"]: str(r["label"]) for r in data} and first.class_names == ("0", "1")
    assert first.train.labels.dtype == np.int32
    for path in paths[1:]:
        other = text.load(path)
        for part in ("train", "validation", "test"):
            assert getattr(other, part).fingerprint == getattr(first, part).fingerprint, path


def test_order_of_rows_does_not_move_them_between_parts(tmp_path):
    first, second = text.load(write(tmp_path / "a.jsonl", rows())), text.load(write(tmp_path / "b.jsonl", rows()[::-1]))
    assert set(first.test.texts) == set(second.test.texts) and first.test.fingerprint != second.test.fingerprint


def test_repeated_texts_are_kept_once_and_counted(tmp_path):
    again = [{"text": "  SENTENCE number 4 ", "label": 1}, {"text": "sentence number 9", "label": 1}]
    splits = text.load(write(tmp_path / "a.jsonl", rows() + again))
    assert everything(splits) == everything(text.load(write(tmp_path / "b.jsonl", rows())))
    assert splits.notes == (f"{tmp_path / 'a.jsonl'}: 2 repeated texts dropped",)


def test_words_as_labels_and_columns_by_name(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"s": r["text"], "y": ("good", "bad")[r["label"]]} for r in rows()])
    splits = text.load(path, text_column="s", label_column="y")
    assert splits.class_names == ("bad", "good") and everything(splits)["sentence number 0"] == "good"
    swapped = text.load(path, text_column="s", label_column="y", class_names=("good", "bad"))
    assert swapped.class_names == ("good", "bad") and everything(swapped) == everything(splits)
    with pytest.raises(DataError, match=r"a\.jsonl:2: unknown label 'bad'\. Did you mean 'bat'"):
        text.load(path, text_column="s", label_column="y", class_names=("good", "bat"))


def test_a_folder_keeps_its_parts_and_lends_train_rows_to_none_it_has(tmp_path):
    write(tmp_path / "train.jsonl", rows())
    write(tmp_path / "test.jsonl", [{"text": "quite new", "label": 1}, {"text": "Sentence number 5", "label": 0}])
    splits = text.load(str(tmp_path))
    assert splits.test.texts == ("quite new", "Sentence number 5")
    assert "sentence number 5" not in splits.train.texts + splits.validation.texts
    assert {text.split_of(t) for t in splits.validation.texts} == {"validation"}
    assert {text.split_of(t) for t in splits.train.texts} == {"train", "test"}


GOOD = [json.dumps(row) for row in rows()]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([*GOOD, '{"text": "x", "label": 1'], r":61: broken JSON: Expecting ',' delimiter"),
        ([*GOOD[:2], "", "nonsense"], r":4: broken JSON"),
        ([*GOOD, '{"txt": "x", "label": 1}'], r":61: no column 'text'; expected text and label, found txt, label"),
        ([*GOOD, '{"text": "x"}'], r":61: no column 'label'; expected text and label, found text"),
        ([*GOOD, "[1, 2]"], r":61: expected an object like .*, found list"),
        ([*GOOD, '{"text": null, "label": 1}'], r":61: the text is null"),
        ([*GOOD, '{"text": 12, "label": 1}'], r":61: the text is int '12'"),
        ([*GOOD, '{"text": " \\t", "label": 1}'], r":61: the text is empty"),
        ([*GOOD, '{"text": "\\ud800", "label": 1}'], r":61: .*surrogate"),
        ([*GOOD, '{"text": "x", "label": null}'], r":61: the label is null"),
        ([*GOOD, '{"text": "x", "label": ""}'], r":61: the label is empty"),
        ([*GOOD, '{"text": "x", "label": 0.5}'], r":61: the label is float '0.5'"),
        ([*GOOD, '{"text": "x", "label": "good"}'], r":61: label 'good' beside 0: numbers and words"),
        ([*GOOD, '{"text": "x", "label": ' + "9" * 5000 + "}"], r":61: broken JSON"),
        ([*GOOD, "[" * 200000], r":61: broken JSON"),
        ([row.replace('"label": 0', '"label": 1') for row in GOOD], "every row has the label 1"),
        (GOOD[:3], "part is empty; 3 distinct texts"),
        ([json.dumps({"text": f"t{n}", "label": n}) for n in range(60)], "60 different labels in 60 rows"),
        ([""], "no rows"),
        ([], "the file is empty"),
    ],
)
def test_a_broken_json_line_is_named(tmp_path, lines, message):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DataError, match=r"data\.jsonl.*" + message) as error:
        text.load(str(path))
    assert "\n" not in str(error.value) and error.value.exit_status == 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"text,label\nfine,1\nno label\n", r"a\.csv:3: 1 cells, but the header has 2"),
        ("a.csv", b'text,label\n"open,1\n', r"a\.csv:2: broken row"),
        ("a.csv", b"body,label\nfine,1\n", r"a\.csv:2: no column 'text'; expected text and label, found body, label"),
        ("a.csv", b"text,label\nfine,1\n,0\n", r"a\.csv:3: the text is empty"),
        ("a.csv", b"text,label\n", r"no rows"),
        ("a.tsv", b"text\tlabel\nfine\t1\ncaf\xe9\t1\n", r"a\.tsv:3: not UTF-8 text \(byte 4 of the line\)"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", r"a\.jsonl:1: a compressed file"),
        ("a.json", b'[{"text": "x", "label": 1},\n {"text": null, "label": 1}]', r"a\.json: row 2: the text is null"),
        (
            "a.json",
            b'[{"text": "x", "label": 1},\n {"text": }]',
            r"a\.json:2: broken JSON: Expecting value at column 11",
        ),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: not a sound Parquet file"),
        ("a.txt", b"x", r"a\.txt: unknown kind of data file. Valid: \.jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        text.load(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_without_permission_is_a_data_error(tmp_path, monkeypatch, name):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")  # root may read anything

    (tmp_path / name).write_text("x")
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match=rf"data file .*{name} cannot be read: Permission denied$") as error:
        text.load(str(tmp_path / name))
    assert error.value.exit_status == 3


def test_missing_and_misspelt_sources_name_the_nearest(tmp_path):
    write(tmp_path / "train_set.jsonl", rows())
    with pytest.raises(DataError, match="does not exist. Did you mean 'train_set.jsonl'"):
        text.load(str(tmp_path / "trainset.jsonl"))
    with pytest.raises(DataError, match="unknown data set 'vader/moive'. Did you mean 'vader/movie'"):
        text.load("vader/moive")
    with pytest.raises(DataError, match="unknown data set 'smokee'. Did you mean 'smoke'"):
        text.load("smokee")
    with pytest.raises(DataError, match="no train file"):
        (tmp_path / "empty").mkdir()
        text.load(str(tmp_path / "empty"))


def fake_hub(monkeypatch, answer):
    import datasets

    calls = []

    def load_dataset(name, config, revision):
        calls.append((name, config, revision))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def hub_part(start: int, stop: int, names=("con", "pro"), hidden: bool = False):
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
    )
    numbers = range(start, stop)
    columns = {"sentence": [f"row {n}" for n in numbers], "label": [-1 if hidden else n % 2 for n in numbers]}
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_hub_set_keeps_its_parts_and_class_names(monkeypatch):
    import datasets

    parts = {"train": hub_part(0, 50), "validation": hub_part(50, 56), "test": hub_part(56, 60, hidden=True)}
    calls = fake_hub(monkeypatch, datasets.DatasetDict(parts))
    splits = text.load("who/what:small@abc", text_column="sentence")
    assert calls == [("who/what", "small", "abc")] and splits.class_names == ("con", "pro")
    assert splits.validation.texts == tuple(f"row {n}" for n in range(50, 56))
    assert {text.split_of(t) for t in splits.test.texts} == {"test"}  # its own had its labels hidden
    assert everything(splits) == {f"row {n}": ("con", "pro")[n % 2] for n in range(56)}
    with pytest.raises(DataError, match=r"who/what.*no column 'text'; expected text and label, found sentence, label"):
        text.load("who/what")


def test_an_unreachable_hub_is_one_line_that_names_what_is_packaged(monkeypatch):
    fake_hub(monkeypatch, ConnectionError("no route to host\nlong story"))
    with pytest.raises(DataError, match=r"'who/what' is no file.*\(no route to host\).*smoke.*vader/movie") as error:
        text.load("who/what")
    assert "\n" not in str(error.value)


@pytest.mark.assets
def test_vader_counts():
    sizes = {"vader/movie": 10605, "vader/amazon": 3708, "vader/nyt": 5190, "vader/tweets": 4200}
    for source, size in sizes.items():
        found = text.ratings(source)
        assert len(found) == size
        assert all(np.abs(scores).max() <= 4 for _, scores in found)
    movie = text.ratings("vader/movie")
    assert len({sentence for sentence, _ in movie}) == 10603
    means = np.array([scores.mean() for _, scores in movie])
    assert ((means >= 0.5).sum(), (means <= -0.5).sum()) == (4996, 5076)
    assert movie[0][0].startswith("The Rock is destined") and movie[0][1].tolist()[:5] == [3, 2, 2, 2, 0]


@pytest.mark.assets
def test_vader_movie_split():
    splits = text.load("vader/movie")
    assert splits.class_names == ("negative", "positive")
    counts = [np.bincount(part.labels).tolist() for part in (splits.train, splits.validation, splits.test)]
    assert counts == [[4087, 3996], [486, 504], [502, 495]]
    assert splits.test.fingerprint == "a390b801f8286b4c"
    assert all("\ufeff" not in sentence and sentence == sentence.strip() for sentence in splits.train.texts)
