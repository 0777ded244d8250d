import json

import pytest

from research.data import instructions
from research.errors import DataError


def write(path, records):
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    return str(path)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.", "input": "1 and 2", "output": " 3 "},
        {"messages": [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}]},
        {"conversations": [{"from": "human", "value": "Add.\n1 and 2"}, {"from": "gpt", "value": "3"}]},
        {"prompt": "Add.\n1 and 2", "completion": "3"},
    ],
)
def test_every_form_gives_the_same_messages(record):
    messages = instructions.conversation(record, "here")
    assert messages == ({"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"})


def test_the_system_text_of_a_row_comes_first():
    roles = [m["role"] for m in instructions.conversation({"system": "s", "prompt": "p", "completion": "c"}, "")]
    assert roles == ["system", "user", "assistant"]


def test_dropped_rows_are_counted_by_reason(tmp_path):
    good = {"prompt": "a", "completion": "b"}
    answer = {"role": "assistant", "content": "b"}
    records = [
        good,
        good,
        {"prompt": "a", "completion": "  "},
        {"instruction": "a", "output": None},
        {"messages": [{"role": "robot", "content": "a"}, answer]},
        {"messages": [{"role": "user", "content": ""}, answer]},
        {"messages": [answer]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt": 3, "completion": "b"},
    ]
    found = instructions.load(write(tmp_path / "rows.jsonl", records))
    assert len(found.kept) == 1
    assert found.dropped == {
        "repeats another row": 1,
        "no answer": 3,
        "unknown role 'robot'": 1,
        "an empty message": 1,
        "no question": 1,
        "a text is no string": 1,
    }
    assert found.notes[0].endswith("3 rows dropped: no answer")


def test_errors_name_file_line_and_choice(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"broken.jsonl:2: broken JSON"):
        instructions.load(str(tmp_path / "broken.jsonl"))
    with pytest.raises(DataError, match=r"form.jsonl:1: unknown form of row; .* found question, reply"):
        instructions.load(write(tmp_path / "form.jsonl", [{"question": 1, "reply": 2}]))
    with pytest.raises(DataError, match=r"no row to learn from: no answer \(1\)"):
        instructions.load(write(tmp_path / "none.jsonl", [{"prompt": "a", "completion": ""}]))
    with pytest.raises(DataError, match=r"does not exist. Did you mean 'none.jsonl'"):
        instructions.load(str(tmp_path / "non.jsonl"))
    with pytest.raises(DataError, match="Did you mean 'alpaca/en'"):
        instructions.load("alpaca/eng")


def test_one_question_is_never_in_two_parts(tmp_path):
    records = [{"prompt": f"q{n // 2}", "completion": f"a{n}"} for n in range(400)]
    found = instructions.load(write(tmp_path / "many.jsonl", records))
    parts = {part: {c.messages[0]["content"] for c in found.part(part)} for part in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 200
    assert 8 <= len(parts["test"]) <= 35
    with pytest.raises(DataError, match="the train part is empty in language 'zh'"):
        found.part("train", "zh")


@pytest.mark.assets
@pytest.mark.slow
def test_the_packaged_sets_have_their_published_rows():
    found = instructions.load("alpaca")
    assert found.languages == ("en", "zh")
    assert len(found.kept) + sum(found.dropped.values()) == 999 + 1000
    assert sum(c.language == "en" for c in found.kept) == len(instructions.load("alpaca/en").kept)
