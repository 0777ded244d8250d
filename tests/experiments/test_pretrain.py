"""`experiments.pretrain` on a tiny text: a model directory that loads, scores that are its own, resuming, refusals."""

import json
import math
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.shared.plain_text import prepare
from research.convert.load import load
from research.data import bpe, corpus, shards
from research.models.gpt2 import Gpt2Config
from research.models.llama import LlamaConfig
from research.peft import adapter as adapters
from research.peft import method as peft
from tests.experiments.script import refused, run

SHAPE = ["--layers=2", "--hidden_size=32", "--heads=4", "--vocab_size=300"]
STEPS = ["--max_length=32", "--steps=8", "--batch_size=8", "--learning_rate=1e-2", "--eval_every=4", "--save_every=4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Sixty documents of a dozen sentences."""
    draw = random.Random(0)
    who = ["the fox", "a dog", "the old king", "my sister", "the river", "a small bird"]
    sentence = lambda: f"{draw.choice(who)} {draw.choice(['sees', 'likes', 'hears'])} {draw.choice(who)}."  # noqa: E731
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("\n\n".join(" ".join(sentence() for _ in range(12)) for _ in range(60)))
    return path


def trained_in(workdir: Path, text: Path, *more: str) -> Path:
    outcome = run("pretrain", f"--data={text}", *SHAPE, *STEPS, *more, f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    return workdir


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory) -> Path:
    return trained_in(tmp_path_factory.mktemp("pretrain"), text)


@pytest.mark.slow
def test_the_model_directory_is_the_model_that_was_scored(trained: Path, text: Path):
    base, result = load(str(trained / "model")), json.loads((trained / "result.json").read_text())
    assert isinstance(base.config, Gpt2Config) and base.config.max_positions == 32
    for part in ("validation", "test"):
        rows = shards.consecutive(shards.load(trained / "text" / "tokens", part).tokens, 31)
        logits = jax.jit(lambda t, m: base.model.apply({"params": base.params}, t, m, method="logits"))(*rows.values())
        logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, :-1])), rows["tokens"][:, 1:, None], axis=-1)
        nats = -float((logp[..., 0] * rows["mask"][:, 1:]).sum())
        size, scores = sum(len(x.encode()) for x in corpus.load(str(text))[part]), result["scores"][part]
        assert scores["loss"] == pytest.approx(nats / rows["mask"][:, 1:].sum(), rel=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
        assert scores["nats_byte"] == pytest.approx(nats / size, rel=1e-5)
        assert scores["bits_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
        assert scores["loss"] < math.log(len(base.tokenizer)) - 1
    words = "the old king sees a small bird."
    assert base.tokenizer.decode(base.tokenizer(words)["input_ids"]) == words


@pytest.mark.slow
def test_writes_what_it_says(trained: Path):
    assert json.loads((trained / "config.json").read_text())["flags"]["hidden_size"] == 32
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 9))
    assert [r["step"] for r in rows if "eval/perplexity" in r] == [4, 8]
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (trained / "samples.txt").read_text().count("|") >= 3


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits_and_its_own_text(trained: Path, text: Path, tmp_path: Path):
    again = Path(shutil.copytree(trained, tmp_path / "again"))
    shutil.rmtree(again / "checkpoints" / "8")
    (again / "model" / "model.safetensors").unlink()
    tokens = (again / "text" / "tokens" / "train.npy").stat().st_mtime_ns
    trained_in(again, text)
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (trained, again))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert (again / "text" / "tokens" / "train.npy").stat().st_mtime_ns == tokens
    outcome = run("pretrain", f"--data={text}", *SHAPE, *STEPS, "--seed=1", f"--workdir={again}")
    refused(outcome, 2, "holds a run", "seed=0, not 1")


@pytest.mark.slow
def test_the_best_step_is_kept_and_not_the_last(text: Path, tmp_path: Path):
    """A rate that ruins the model: no step after the first evaluation can be as good as a later one claims."""
    trained_in(tmp_path, text, "--learning_rate=0.5", "--schedule=constant", "--warmup=0", "--eval_every=1")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["eval/loss"] for r in rows if "eval/loss" in r}
    result, best = json.loads((tmp_path / "result.json").read_text()), min(losses, key=losses.get)
    assert len(losses) == 8 and result["best_step"] == best
    assert result["scores"]["validation"]["loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.slow
def test_evaluation_alone_gives_the_scores_of_training(trained: Path, text: Path, tmp_path: Path):
    command = ["--mode=evaluate", f"--init={trained / 'model'}", f"--data={text}", *STEPS, f"--workdir={tmp_path}"]
    outcome = run("pretrain", *command)
    assert outcome.status == 0, outcome.err
    for part, scores in json.loads((trained / "result.json").read_text())["scores"].items():
        row = next(line for line in outcome.out.splitlines() if line.startswith(f"| {part} "))
        printed = [float(x) for x in row.split("|")[2:6]]
        assert printed == pytest.approx([scores[k] for k in ("loss", "perplexity", "nats_byte", "bits_byte")], abs=2e-3)
    fewer = run("pretrain", *command, "--eval_rows=2", "--quantise=int8")
    assert fewer.status == 0 and "scored tokens: " in fewer.out, fewer.err
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "text").exists()
    refused(run("pretrain", "--mode=evaluate", f"--workdir={tmp_path}"), 2, "--mode=evaluate", "--init=DIRECTORY")


@pytest.mark.slow
def test_a_method_on_what_was_trained_leaves_an_adapter(trained: Path, text: Path, tmp_path: Path):
    arguments = [f"--init={trained / 'model'}", "--peft=lora:targets=all", f"--data={text}", *STEPS]
    outcome = run("pretrain", *arguments, f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    base, loaded = load(str(trained / "model")), adapters.load(tmp_path / "adapter")
    variables = adapters.attach(loaded, base.params, peft.sites(base.model), base.fingerprint)
    assert loaded.meta["task"] == "lm" and variables["peft"]
    before, after = (json.loads((d / "result.json").read_text())["scores"]["test"]["loss"] for d in (trained, tmp_path))
    assert after < before
    outcome = run("generate", f"--model={trained / 'model'}", f"--adapter={tmp_path / 'adapter'}", "--prompt=the old",
                  "--max_new=4")  # fmt: skip
    assert outcome.status == 0 and outcome.out.startswith("the old"), outcome.err


@pytest.mark.slow
def test_a_llama_and_a_mesh(text: Path, tmp_path: Path):
    """Eight devices and two micro-batches end where one device and one batch do."""
    one = trained_in(tmp_path / "one", text, "--family=llama")
    base = load(str(one / "model"))
    config, words = base.config, "the old king sees a small bird."
    assert base.tokenizer.decode(base.tokenizer(words)["input_ids"]) == words, "nothing is put before a text"
    assert isinstance(config, LlamaConfig) and config.tie_embeddings and config.intermediate_size == 128
    shared = trained_in(tmp_path / "mesh", text, "--family=llama", "--mesh=data:2,fsdp:2,tensor:2", "--micro_batches=2")
    found = load_file(shared / "model" / "model.safetensors")
    for leaf, value in load_file(one / "model" / "model.safetensors").items():
        np.testing.assert_allclose(found[leaf], value, atol=2e-3, err_msg=leaf)


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(text: Path, tmp_path: Path):
    outcome = run("pretrain", f"--data={text}", *SHAPE, *STEPS, "--dry_run", f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    for words in ("optimiser", "1x8x32", "a row: ", "epochs", "train "):
        assert words in outcome.out, words
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]


def test_text_is_encoded_once_for_the_same_documents_and_vocabulary(text: Path, tmp_path: Path):
    one = prepare(str(text), tmp_path, 300)
    written = (tmp_path / "tokenizer.json").stat().st_mtime_ns
    two = prepare(str(text), tmp_path, 300)
    assert two.fingerprint == one.fingerprint and (tmp_path / "tokenizer.json").stat().st_mtime_ns == written
    documents = corpus.load(str(text))
    whole = {part: "".join(texts).encode() for part, texts in documents.items()}
    assert two.baselines["test"]["ngram"] == bpe.ByteModel(whole["train"], 5).bits(whole["test"])
    assert two.baselines["validation"]["gzip"] == bpe.gzip_bits(whole["validation"])
    assert {part: x.bytes for part, x in two.parts.items()} == {part: len(x) for part, x in whole.items()}
    told = two.tokenizer.decode(two.parts["test"].tokens, skip_special_tokens=False)
    assert told == "".join(f"{document}{bpe.END}" for document in documents["test"])
    assert prepare(str(text), tmp_path, 290).fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--peft=lora"], 2, ["--peft=lora adapts a base", "--init"]),
        (["--heads=5"], 2, ["heads=5", "384", "4, 6"]),
        (["--init=nowhere", "--layers=3"], 2, ["--layers is for a fresh model"]),
        (["--quantise=int8"], 2, ["--quantise is for a base"]),
        (["--init=nowhere/at/all"], 4, ["nowhere/at/all"]),
        (["--init=smoke"], 4, ["smoke is no language model"]),
        (["--init=smoke-llama"], 4, ["smoke-llama has no end-of-text token"]),
        (["--data=austin"], 3, ["austin", "Did you mean 'austen'?"]),
        (["--vocab_size=200"], 2, ["vocab_size"]),
        (["--max_length=8"], 2, ["max_length"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], status: int, words: list[str], tmp_path: Path):
    refused(run("pretrain", *arguments, f"--workdir={tmp_path}"), status, *words)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "text").exists()


@pytest.mark.slow
def test_rows_that_do_not_fit_are_refused(trained: Path, text: Path, tmp_path: Path):
    known = [f"--init={trained / 'model'}", f"--data={text}", f"--workdir={tmp_path}"]
    refused(run("pretrain", *known, "--max_length=33"), 2, "max_length=33", "32 positions")
    refused(run("pretrain", *known, "--max_length=32", "--peft=prompt:length=4"), 2, "at most max_length=28")
    known[1] = f"--data={tmp_path / 'short.txt'}"
    (tmp_path / "short.txt").write_text("one\n\ntwo\n\nthree\n\nfour\n\nfive\n\nsix")
    refused(run("pretrain", *known, "--max_length=32"), 3, "short.txt", "too few to split")
