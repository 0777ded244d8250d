"""`experiments.generate` on the tiny random decoder."""

import json

from tests.experiments.script import refused, run


def test_a_text_does_not_depend_on_its_neighbours(tmp_path):
    options = ("--model=smoke-llama", "--max_new=4", "--temperature=1", f"--output={tmp_path / 'out.jsonl'}")
    first = run("generate", *options, "--prompt=a good film", "--prompt=a very long and rather bad film of its kind")
    assert first.status == 0, first
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a good film", "a very long and rather bad film of its kind"]
    assert all(1 <= len(row["tokens"]) <= 4 and row["logprob"] < 0 for row in rows)
    alone = run("generate", *options, stdin="a good film\n\n")
    assert alone.out.splitlines() == first.out.splitlines()[:1]
    assert json.loads((tmp_path / "out.jsonl").read_text())["tokens"] == rows[0]["tokens"]


def test_bad_input(tmp_path):
    refused(run("generate", "--model=smoke-llama", stdin="\n"), 3, "no prompt")
    refused(run("generate", "--model=smoke-llama", "--prompt=a", "--file=b"), 2, "exclude")
    refused(run("generate", "--model=smoke-llama", f"--file={tmp_path / 'none'}"), 3, "none", "No such file")
    refused(run("generate", "--model=smoke-llama", "--prompt=a", "--top_p=0"), 2, "top_p=0")
    refused(run("generate", "--model=smoke", "--prompt=a"), 4, "no language model")
    refused(run("generate", "--model=smoke-llama", "--prompt=a", "--chat"), 4, "no chat template")
    refused(run("generate", "--model=smoke-llama", "--prompt=" + "film " * 600), 3, "prompt 1 has", "at most")
