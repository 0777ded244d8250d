"""`experiments.generate` on the tiny random decoder."""

import json

import jax
import pytest

from research.convert.load import load
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import registry
from tests import tiny
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


@pytest.mark.slow
def test_several_adapters_answer_each_prompt_as_each_alone(tmp_path):
    base, spec = load("smoke-llama"), "lora:rank=2"
    sites = peft.sites(base.model)
    about = {"name": base.name, "fingerprint": base.fingerprint}
    for seed, name in enumerate("ab"):
        added = tiny.noise(peft.init(registry.parse(spec), jax.random.key(0), sites), std=0.5, seed=seed)
        adapters.save(tmp_path / name, spec, {"params": base.params, "peft": added}, sites, about, task="lm")
    prompts = ("--prompt=a good film", "--prompt=the plot")
    both = run("generate", f"--adapter={tmp_path / 'a'},{tmp_path / 'b'}", *prompts, "--max_new=6")
    assert both.status == 0, both
    each = [run("generate", f"--adapter={tmp_path / name}", *prompts, "--max_new=6").out.splitlines() for name in "ab"]
    assert both.out.splitlines() == [f"{tmp_path / n}: {each[i][p]}" for p in (0, 1) for i, n in enumerate("ab")]
    assert each[0] != each[1]


@pytest.mark.slow
def test_beams_penalties_and_what_they_exclude(tmp_path):
    options = ("--model=smoke-llama", "--prompt=a good film", "--max_new=5", f"--output={tmp_path / 'out.jsonl'}")
    scores = []
    for more in ((), ("--beams=4", "--length_penalty=0")):
        outcome = run("generate", *options, *more)
        assert outcome.status == 0, outcome
        scores.append(json.loads((tmp_path / "out.jsonl").read_text())["logprob"])
    assert scores[1] >= scores[0] - 1e-4
    assert run("generate", *options, "--no_repeat_ngram=1", "--repetition_penalty=1.3").status == 0
    tokens = json.loads((tmp_path / "out.jsonl").read_text())["tokens"]
    assert len(set(tokens)) == len(tokens)
    refused(run("generate", *options, "--beams=4", "--temperature=1"), 2, "leave out --temperature")
    refused(run("generate", *options, "--repetition_penalty=0"), 2, "repetition_penalty=0")
