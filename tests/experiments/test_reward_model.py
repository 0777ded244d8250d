"""`experiments.reward_model` and `experiments.best_of_n`: soft pairs, scores, the best of n and what it costs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import best_of_n, reward_model
from experiments.shared import preferences
from research.data import pairs, text
from research.data.smoke import smoke_tokenizer
from research.errors import DataError, FlagError
from research.rl.rewards import best_of_kl
from tests.experiments.script import refused, run

ENCODER = preferences.Encoder(smoke_tokenizer(), "text")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------- pairs


def test_soft_pairs_end_in_the_token_that_is_scored_and_parts_share_no_text():
    data = reward_model.load_data("smoke", ENCODER, 8, (60, 20), 0, soft=True)
    train = data.parts["train"]
    assert train["chosen_tokens"].shape == (60, 8) and set(train["target"]) == {0.0, 0.5, 1.0}
    last = train["chosen_mask"].sum(axis=1) - 1
    assert (train["chosen_tokens"][np.arange(60), last] == ENCODER.end).all(), "a text that is cut keeps its end"
    drawn = pairs.pair_up([(t, np.asarray([y])) for t, y in _rated("train")], 60, 0)
    assert np.array_equal(train["target"], drawn.probability)
    ids = ENCODER.whole(drawn.texts[drawn.first[5]])[1]
    assert np.array_equal(train["chosen_tokens"][5, : last[5]], ids[: last[5]])
    hard = reward_model.load_data("smoke", ENCODER, 8, (60, 20), 0, soft=False)
    assert set(hard.parts["train"]["target"]) == {0.0, 1.0} and "left out: a tie" in hard.notes[0]
    seen = {part: {tuple(row) for row in leaves["chosen_tokens"]} for part, leaves in data.parts.items()}
    assert not seen["train"] & seen["test"]


def _rated(part: str) -> list[tuple[str, int]]:
    found = getattr(text.load("smoke"), part)
    return list(zip(found.texts, found.labels.tolist(), strict=True))


def test_agreement_of_raters(monkeypatch):
    rated = [("a", np.asarray([3, 3, 3, 3])), ("b", np.asarray([0, 0, 4, 4])), ("c", np.asarray([-1, -1, -1, -1]))]
    found = pairs.SoftPairs(("a", "b", "c"), *(np.asarray(x) for x in ([0, 0, 1], [1, 2, 2], [0.5, 1.0, 1.0])))
    monkeypatch.setattr(text, "ratings", lambda source: rated)
    told = reward_model.agreement("vader/movie", found)
    assert told == {"rater": 1.0, "halves": 1.0}, "a tie of chances has no order to agree on"
    rated[0], rated[1] = ("a", np.asarray([1, 1, 3, 1])), ("b", np.asarray([0, 2, 0, 2]))
    found = pairs.SoftPairs(("a", "b"), np.asarray([0]), np.asarray([1]), np.asarray([0.625]))
    assert reward_model.agreement("vader/movie", found) == {"rater": 0.625, "halves": 0.0}, "even before, odd behind"


# ------------------------------------------------------------------------------------------------- best of n


def test_curve_is_unbiased_and_its_cost_the_closed_form():
    table = np.asarray([[1.0, 2.0, 4.0], [0.0, 0.0, 3.0]])
    points = best_of_n.curve(table)
    assert [p["n"] for p in points] == [1, 2, 3]
    pairs_of_three = [(0, 1), (0, 2), (1, 2)]
    want = [table.mean(), np.mean([table[:, list(p)].max(axis=1) for p in pairs_of_three]), 3.5]
    assert [p["score"] for p in points] == pytest.approx(want)
    assert [p["kl"] for p in points] == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    assert best_of_kl(64) == pytest.approx(3.174508, abs=1e-6)


def test_keeps_the_best_and_counts_what_can_not_be_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(best_of_n, "draw", lambda points, png: None)
    drawn, nan = [["x", "y"], ["u", "v"], ["r", "s"], ["p", "q"]], math.nan
    table = np.asarray([[1.0, 2.0], [nan, 0.5], [nan, nan], [3.0, 3.0]])
    best_of_n.write(tmp_path, ["one ", "two ", "three ", "four "], drawn, table, {"reward": 3})
    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["text"], r["score"]) for r in rows] == [
        ("one ", "y", 2.0), ("two ", "v", 0.5), ("four ", "p", 3.0)]  # fmt: skip
    assert [json.loads(x) for x in (tmp_path / "pairs.jsonl").read_text().splitlines()] == [
        {"prompt": "one ", "chosen": "y", "rejected": "x"}]  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["prompts"], result["left_out"], result["unscored"]) == (3, 1, {"reward": 3})
    assert result["kl"] == pytest.approx(math.log(2) - 0.5) and result["curve"][-1]["score"] == 2.5
    assert "0.193147 nats" in capsys.readouterr().out


def test_checks(tmp_path):
    said = ["it is 12, so 1,234", "42", "none"]
    of = lambda name, answers: best_of_n.checker(name, answers)(["p"] * 3, said)  # noqa: E731
    assert of("number", ["1234", "42.0", "7"]) == [1.0, 1.0, 0.0]
    assert of("contains", ["12", None, "x"]) == [1.0, None, 0.0]
    assert of("equals", ["it", "42", None]) == [0.0, 1.0, None]
    assert of("regex:^[0-9]+$", [None] * 3) == [0.0, 1.0, 0.0]
    for name, words in (("numbr", "Did you mean 'number'"), ("regex:(", "no.*regular expression")):
        with pytest.raises(FlagError, match=words):
            of(name, ["1"] * 3)
    with pytest.raises(DataError, match="rows with an answer"):
        of("equals", [None] * 3)
    file = write(tmp_path / "rows.jsonl", [{"prompt": "1 + 1 =", "answer": 2}, {"prompt": "?"}])
    assert best_of_n.read_prompts([], file) == (["1 + 1 =", "?"], ["2", None])
    with pytest.raises(DataError, match=r"bad.jsonl:1: expected an object"):
        best_of_n.read_prompts([], write(tmp_path / "bad.jsonl", [{"question": "1"}]))


# ------------------------------------------------------------------------------------------------- the scripts

TINY = ["--model=smoke-llama", "--data=smoke", "--pairs=160", "--held_out=60", "--batch_size=16", "--max_length=16"]
TINY += ["--steps=40", "--learning_rate=2e-2", "--eval_every=0", "--save_every=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reward")
    outcome = run("reward_model", *TINY, "--nosoft", "--peft=lora:rank=8", f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    return workdir, outcome.out


@pytest.mark.slow
def test_learns_and_its_scores_are_normal(trained):
    workdir, out = trained
    result = json.loads((workdir / "result.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert result["test"]["rewards/accuracies"] > 0.9 > rows[0]["rewards/accuracies"]
    assert result["people"] == {"rater": 1.0} and f"{result['test']['rewards/accuracies']:.4f}" in out
    score = reward_model.load_reward(str(workdir / "adapter"))
    texts = [t for t, _ in _rated("train")]
    found = np.asarray(score([""] * len(texts), texts))
    assert abs(found.mean()) < 0.3 and 0.7 < found.std() < 1.3, "the same texts as in the pairs, each once"
    good = np.asarray([y for _, y in _rated("train")]) == 1
    assert found[good].mean() > found[~good].mean() + 1
    assert score(["the tour ", "a"], ["guide", " "])[1] is None, "no words, no score"
    assert score(["the tour "], ["guide"]) == pytest.approx(score([""], ["the tour guide"]), abs=1e-5)


@pytest.mark.slow
def test_best_of_n_under_a_reward_model(trained, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the museum\nher garden was\n" + "the " * 300)
    outcome = run("best_of_n", "--model=smoke-llama", f"--file={prompts}", "--n=4", "--max_new=6", "--batch_size=3",
                  f"--reward={trained[0] / 'adapter'}", f"--workdir={tmp_path / 'run'}")  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "1 prompts left out: more than 250 tokens" in outcome.out and "0.636294 nats" in outcome.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "best.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the museum", "her garden was"]
    score = reward_model.load_reward(str(trained[0] / "adapter"))
    again = score([row["prompt"] for row in rows], [row["text"] for row in rows])
    assert again == pytest.approx([row["score"] for row in rows], abs=1e-4), "the reward model's own scores"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    scores = [p["score"] for p in result["curve"]]
    assert [p["n"] for p in result["curve"]] == [1, 2, 4] and scores == sorted(scores)
    assert scores[0] == pytest.approx(result["mean"]) and scores[-1] == pytest.approx(result["best"])
    assert (tmp_path / "run" / "best_of_n.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_published_pairs_with_margins_make_a_dry_run(tmp_path):
    rows = [{"prompt": f"the museum {'the ' * (i % 5)}{i}", "chosen": "was lovely", "rejected": "was dull", "margin": 1}
            for i in range(60)]  # fmt: skip
    rows = [row | {"prompt": f"{row['prompt']} {i * 7919}"} for i, row in enumerate(rows)]
    outcome = run("reward_model", "--model=smoke-llama", f"--data={write(tmp_path / 'p.jsonl', rows)}", "--dry_run",
                  "--batch_size=8", f"--workdir={tmp_path / 'run'}")  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "rejected_mask" in outcome.out and "margin" in outcome.out and "completion" not in outcome.out


@pytest.mark.parametrize(
    ("script", "arguments", "status", "words"),
    [
        ("reward_model", ["--model=smoke", "--data=vader/movies"], 3, ["vader/movies"]),
        ("reward_model", ["--model=smoke", "--data=smoke", "--max_length=1000"], 2, ["max_length=1000", "at most"]),
        ("best_of_n", ["--prompt=a"], 2, ["--reward", "--check"]),
        ("best_of_n", ["--check=regex:a"], 2, ["--prompt", "--file"]),
        ("best_of_n", ["--prompt=a", "--reward=nowhere"], 4, ["nowhere", "no adapter"]),
        ("best_of_n", ["--prompt=a", "--check=regex:a", "--temperature=-1"], 2, ["temperature=-1"]),
        ("best_of_n", ["--prompt=a", "--check=regex:a", "--model=smoke"], 4, ["no language model"]),
        ("best_of_n", ["--prompt=a", "--check=regex:a", "--model=smoke-llama", "--max_new=256"], 3, ["leaves room"]),
    ],
)
def test_bad_input_is_one_line(script, arguments, status, words, tmp_path):
    refused(run(script, *arguments, f"--workdir={tmp_path}"), status, *words)
