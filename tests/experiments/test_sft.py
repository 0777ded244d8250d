"""`experiments.sft` on the tiny decoder: what is learnt, a run and its answers, going on, a mesh, refusals."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.shared import language, replies
from research.data import smoke
from research.data.chat import Chat
from research.data.instructions import collect
from research.errors import DataError, FlagError
from research.generate.sampling import Sampling
from research.peft import adapter as adapters
from research.peft import method as peft
from research.tasks import lm
from tests import tiny
from tests.data.test_chat import tokenizer
from tests.experiments.script import refused, run

TINY = [
    "--model=smoke-llama",
    "--template=plain",
    "--steps=6",
    "--batch_size=8",
    "--max_length=32",
    "--max_new=4",
    "--samples=1",
    "--save_every=3",
    "--eval_every=3",
    "--learning_rate=1e-2",
]


def write_talks(path: Path) -> Path:
    """Conversations of all four forms, in two languages, with rows that are left out."""
    forms = [
        lambda q, a: {"instruction": q, "output": a},
        lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        lambda q, a: {"prompt": q, "completion": a},
    ]
    records = []
    for number, (text, _) in enumerate(smoke.sentences()):
        words = text.rstrip(".").split()
        question, answer = f"{' '.join(words[:3])} {number}", " ".join(words[3:])
        records.append(forms[number % 4](question, answer) | {"language": "ab"[number % 2]})
    records += [{"prompt": "the museum", "completion": " "}]
    records += [{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    return write_talks(tmp_path_factory.mktemp("talks") / "talks.jsonl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, talks: Path) -> Path:
    workdir = tmp_path_factory.mktemp("sft")
    outcome = run("sft", *TINY, f"--data={talks}", f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    assert "1 rows dropped: no answer" in outcome.out and "1 rows dropped: unknown role 'robot'" in outcome.out
    return workdir


@pytest.fixture(scope="module")
def base():
    return replies.load_model("smoke-llama")


def recipe(**changes) -> language.Recipe:
    return language.Recipe(**{"learning_rate": 1e-3, "batch_size": 4, "max_length": 32} | changes)


# ------------------------------------------------------------------------------------------------------ what is learnt


def test_the_closing_token_is_learnt_although_it_pads():
    record = {"prompt": "Hi", "completion": "Hello"}
    talks = collect("here", [("1", record, "")]).kept
    chat = Chat(tokenizer(), "plain")
    assert chat.tokenizer.pad_token_id == chat.closing
    arrays, notes = language.rows(chat, talks, recipe(), "train")
    count = len(chat.encode(talks[0].messages).tokens)
    assert arrays["mask"][0].tolist() == [1] * count + [0] * (32 - count)
    learnt = arrays["tokens"][0][arrays["loss_mask"][0] == 1]
    assert chat.tokenizer.decode(learnt) == " Hello<|im_end|>"
    assert (arrays["tokens"][0, count:] == chat.closing).all() and not arrays["loss_mask"][0, count:].any()
    assert "1 conversations (1 kept;" in notes[0] and f"{len(learnt)} tokens to learn" in notes[0]


def test_what_is_cut_is_told():
    records = [(str(n), {"prompt": "a" * n, "completion": "b" * 9}, "") for n in (1, 8, 60)]
    chat, talks = Chat(tokenizer(), "plain"), collect("here", records).kept
    right = language.rows(chat, talks, recipe(), "train")
    assert "3 conversations (1 kept, 1 cut, 1 nothing to learn; longer than 32 tokens: right)" in right[1][0]
    left = language.rows(chat, talks, recipe(truncation="left"), "train")
    assert "1 kept, 2 cut;" in left[1][0] and left[0]["loss_mask"].sum() > right[0]["loss_mask"].sum()
    with pytest.raises(DataError, match="no example is left at 8 tokens"):
        language.rows(chat, talks, recipe(max_length=8, truncation="drop"), "train")


@pytest.mark.slow
def test_packed_rows_have_the_held_out_loss_of_rows_of_their_own(base, talks: Path):
    """Also that the copies which fill up the last batch count nothing: the numbers of rows differ."""
    chat = replies.chat_of(base, "plain")
    packings = [language.load_data(str(talks), chat, recipe(packing=p, max_length=64)) for p in ("first_fit", "none")]
    shapes = [[len(part["tokens"]) for part in data.validation.values()] for data in packings]
    assert all(a < b for a, b in zip(*shapes, strict=True)) and any(n % 4 for n in shapes[0])
    packed, alone = (language.base_losses(base, data, 4) for data in packings)
    assert packed.keys() == {"loss", "a", "b", "weight"}
    for name, value in alone.items():
        np.testing.assert_allclose(packed[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_no_array_holds_the_logits_of_all_tokens(base, talks: Path):
    data = language.load_data(str(talks), replies.chat_of(base, "plain"), recipe())
    batch = {name: leaf[:8] for name, leaf in data.train.items()}
    vocabulary = base.config.vocab_size

    def largest(chunk: int | None) -> int:
        loss = lm.loss(base.model, chunk)
        gradient = jax.grad(lambda p: loss({"params": p}, batch, None).sum)
        made = tiny.equations(jax.make_jaxpr(gradient)(base.params).jaxpr)
        shapes = [out.aval.shape for eqn in made for out in eqn.outvars if hasattr(out.aval, "shape")]
        return max(int(np.prod(s[:-1])) for s in shapes if s and s[-1] == vocabulary)

    assert largest(None) >= 8 * 31
    assert largest(16) <= max(16, base.config.hidden_size)  # the gradient of the token table is [D, V]


# --------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_writes_config_metrics_plot_checkpoint_adapter_and_result(trained: Path):
    assert json.loads((trained / "config.json").read_text())["flags"]["truncation"] == "right"
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((trained / "result.json").read_text())
    losses = {r["step"]: (r["eval/loss"], r["eval/a"], r["eval/b"]) for r in rows if "eval/loss" in r}
    assert list(losses) == [0, 3, 6]
    for step, name in ((0, "before"), (6, "after")):
        np.testing.assert_allclose(losses[step], [result[name][k] for k in ("loss", "a", "b")], rtol=1e-6)
    assert result["after"]["loss"] < result["before"]["loss"] - 0.02
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert result["adapter_bytes"] == sum(f.stat().st_size for f in (trained / "adapter").iterdir())
    assert [s["language"] for s in result["samples"]] == ["a", "b"]


@pytest.mark.slow
def test_the_adapter_answers_as_training_ended_and_streams_the_same(trained: Path, base):
    sample = json.loads((trained / "result.json").read_text())["samples"][0]
    options = (f"--adapter={trained / 'adapter'}", "--max_new=4")  # its base and its template are in it
    answer = run("generate", *options, "--chat", f"--prompt={sample['question']}")
    assert answer.status == 0, answer.err
    assert answer.out.strip() == sample["after"]
    talk = run(
        "generate", *options, "--interactive", stdin=f"{sample['question']}\n\n{sample['question']}\nthe museum\n"
    )
    assert talk.status == 0, talk.err
    first, again, more = (line.strip() for line in talk.out.splitlines())
    assert first == again == sample["after"]
    loaded = adapters.load(trained / "adapter")
    variables = adapters.attach(loaded, base.params, peft.sites(base.model), base.fingerprint)
    history = [("user", sample["question"]), ("assistant", again), ("user", "the museum")]
    asked = [{"role": role, "content": content} for role, content in history]
    assert replies.answers(base, replies.chat_of(base, "plain"), variables, [asked], 4) == [more]


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_adapter(trained: Path, talks: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "again")
    for name in ("result.json", "before.json"):
        (tmp_path / "again" / name).unlink()
    for name in ("adapter", "checkpoints/6"):
        shutil.rmtree(tmp_path / "again" / name)
    outcome = run("sft", *TINY, f"--data={talks}", f"--workdir={tmp_path / 'again'}")
    assert outcome.status == 0, outcome.err
    assert "going on from step 3" in outcome.err
    one, two = (load_file(d / "adapter" / "adapter.safetensors") for d in (trained, tmp_path / "again"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    lines = [(d / "metrics.jsonl").read_text().splitlines() for d in (trained, tmp_path / "again")]
    assert lines[0] == lines[1]
    finished = run("sft", *TINY, f"--data={talks}", f"--workdir={tmp_path / 'again'}")
    assert "finished before" in finished.out and "compiling" not in finished.out
    refused(run("sft", *TINY, f"--data={talks}", "--seed=1", f"--workdir={tmp_path / 'again'}"), 2, "seed=0, not 1")


@pytest.mark.slow
def test_a_mesh_of_all_devices_ends_where_one_device_does(trained: Path, talks: Path, tmp_path: Path):
    mesh = "--mesh=data:2,fsdp:2,tensor:2"
    outcome = run("sft", *TINY, f"--data={talks}", mesh, f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    one, eight = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (trained, tmp_path))
    for name, leaf in one.items():
        np.testing.assert_allclose(eight[name], leaf, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adamix:width=4", "prefix:length=2"])
def test_a_dry_run_shows_what_is_learnt_and_writes_nothing(method: str, talks: Path, tmp_path: Path):
    outcome = run("sft", *TINY, f"--peft={method}", f"--data={talks}", "--dry_run", f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    for words in ("optimiser", "loss_mask", "1x8x32", "a conversation: '", "what is learnt: '", "[SEP]"):
        assert words in outcome.out, words
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "before.json").exists()


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.slow
def test_tokens_come_one_by_one_as_they_do_in_a_batch(base):
    ids, sampling = [5, 9, 12, 7], Sampling(1.2, top_k=20)
    out = replies.decode(base, {"params": base.params}, [ids], 6, sampling, seed=3).out
    tokens = out.tokens[0].tolist()
    stream = replies.streamer(base, {"params": base.params}, 6, sampling, ())
    assert list(stream(ids, jax.random.key(3))) == tokens
    ended = replies.streamer(base, {"params": base.params}, 6, sampling, (tokens[2],))
    assert list(ended(ids, jax.random.key(3))) == tokens[: tokens.index(tokens[2])]


def test_a_stop_string_is_held_back_and_half_a_character_too():
    class Bytes:
        tokenizer = tokenizer()

    text = "再见 END. more"
    ids = Bytes.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    for stops, whole in (([], text), (["END."], "再见"), (["再", "END"], ""), (["more!"], text)):
        shown: list[str] = []
        assert replies.spoken(Bytes, iter(ids), stops, shown.append) == whole
        assert "".join(shown).strip() == whole and "\ufffd" not in "".join(shown)
    assert replies.cut("a b c", ["c", "b"]) == "a "


def test_prompts_are_padded_on_the_left_and_long_ones_refused(base):
    tokens, mask = replies.pad_left(base, [[3], [4, 5]], 8)
    assert tokens.shape == (2, 32) and tokens[:, -2:].tolist() == [[0, 3], [4, 5]] and mask.sum(1).tolist() == [1, 2]
    most = base.config.max_positions - 8
    with pytest.raises(DataError, match=f"prompt 2 has {most + 1} tokens: .* at most {most} fit"):
        replies.pad_left(base, [[3], [4] * (most + 1)], 8)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        replies.pad_left(base, [[]], 8)


@pytest.mark.slow
def test_a_stop_string_ends_a_row_of_the_output(tmp_path: Path):
    options = ("--model=smoke-llama", "--prompt=the museum", "--max_new=5", f"--output={tmp_path / 'o.jsonl'}")
    run("generate", *options)
    whole = json.loads((tmp_path / "o.jsonl").read_text())
    words = whole["text"].split()
    run("generate", *options, f"--stop={words[-1]}", "--stop=never")
    cut = json.loads((tmp_path / "o.jsonl").read_text())
    place = words.index(words[-1])
    assert cut["text"].split() == words[:place] and cut["tokens"] == whole["tokens"][: place + 1]
    assert cut["logprob"] >= whole["logprob"]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--template=plan"], 4, ["plan", "Did you mean 'plain'?"]),
        (["--model=smoke-llama"], 4, ["no chat template", "chatml, plain"]),
        (["--data=alpaca/fr"], 3, ["alpaca/fr", "Did you mean 'alpaca'?"]),
        (["--data=nowhere.jsonl"], 3, ["nowhere.jsonl", "does not exist"]),
        (["--batch_size=4000"], 2, ["4000"]),
        (["--max_length=300"], 2, ["max_length=300", "256 positions"]),
        (["--peft=prompt:length=300"], 2, ["300 virtual tokens"]),
        (["--peft=lorra"], 2, ["Did you mean 'lora'?"]),
        (["--truncation=middle"], 2, ["middle"]),
        (["--model=smoke"], 4, ["no language model"]),
        (["--steps=0"], 2, ["steps"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], status: int, words: list[str], talks: Path, tmp_path: Path):
    given = [f"--data={talks}", *TINY] if arguments != ["--model=smoke-llama"] else [f"--data={talks}"]
    refused(run("sft", *given, *arguments, f"--workdir={tmp_path}"), status, *words)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["no row to learn from", "no rows"]),
        ([{"prompt": "a", "completion": ""}], ["no row to learn from", "no answer (1)"]),
        ([{"conversations": [{"from": "bot", "value": "a"}]}], ["unknown role 'bot' (1)"]),
        ([{"question": "a"}], ["rows.jsonl:1", "unknown form of row"]),
        ([{"prompt": "a", "completion": "b"}], ["part is empty", "1 rows are too few to split"]),
    ],
)
def test_rows_that_teach_nothing_are_one_line(lines: list, words: list[str], tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, lines)))
    refused(run("sft", *TINY, f"--data={rows}", f"--workdir={tmp_path / 'w'}"), 3, *words)


@pytest.mark.slow
def test_a_hub_id_without_a_network_is_one_line(tmp_path: Path):
    refused(run("sft", *TINY, "--data=somebody/talks", f"--workdir={tmp_path}"), 3, "somebody/talks", "hub data set")


def test_bad_flags_of_generate_are_one_line(tmp_path: Path):
    refused(run("generate", "--interactive", "--prompt=a"), 2, "leave out --prompt")
    refused(run("generate", "--prompt=a", "--stop="), 2, "--stop is empty")
    refused(run("generate", f"--adapter={tmp_path}", "--prompt=a"), 4, "no adapter")
    with pytest.raises(FlagError, match="virtual tokens"):
        language.fits(replies.load_model("smoke-llama"), "prefix:length=240", recipe())
