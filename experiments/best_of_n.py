"""Samples n answers to each prompt, scores them, keeps the best: what a reward is worth without any training.

    python -m experiments.best_of_n --n=16 --prompt="The film" --reward=runs/reward_model/adapter
    python -m experiments.best_of_n --file=prompts.txt --adapter=runs/sft/adapter --reward=runs/reward_model/adapter
    python -m experiments.best_of_n --file=sums.jsonl --check=number --n=8     # {"prompt": ..., "answer": ...} a line

A score is a reward model's (an adapter that `reward_model` saved) or a check against the row's `answer`: `contains`,
`equals`, `number` (the last one in the text), or `regex:PATTERN`, which needs none. Prints what the best of 1, 2, 4 ...
n would score, unbiased from the n samples, beside the KL that costs at most, log k - (k - 1) / k nats. Differs from
`generate`, which keeps what it draws. The same command gives the same texts. Writes config.json, best.jsonl,
pairs.jsonl (best and worst, for `preference --data=`), result.json and best_of_n.png under --workdir.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tabulate import tabulate

from experiments import reward_model
from experiments.shared import common, preferences
from experiments.shared.replies import load_model
from research.convert.load import Pretrained
from research.data.instructions import read_records
from research.errors import DataError, FlagError, did_you_mean
from research.files import write_text
from research.generate.decode import generate as decode
from research.generate.sampling import Sampling
from research.peft import adapter as adapters
from research.peft import method as peft
from research.rl import rewards
from research.rl.pairs import best_and_worst
from research.train import plot
from research.train.lock import lock

CHECKS = ("contains", "equals", "number", "regex:PATTERN")


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags("smollm2-135m-instruct")
    flags.DEFINE_string("adapter", None, "The policy's adapter directory.")
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
    flags.DEFINE_string("file", None, "Prompts: a text file, one a line, or .jsonl rows with prompt and answer.")
    flags.DEFINE_string("template", "text", "How a prompt is put: text as it is, or own, chatml, plain, plain/zh.")
    flags.DEFINE_integer("n", 16, "Samples of each prompt.", lower_bound=1)
    flags.DEFINE_string("reward", None, "Adapter directory of a reward model.")
    flags.DEFINE_string("reward_model", None, "Its base, where it is not the one that the adapter names.")
    flags.DEFINE_string("check", None, f"What else scores 1 or 0: {', '.join(CHECKS)}.")
    flags.DEFINE_integer("max_new", 32, "Most tokens of an answer.", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "0 takes the most likely token, n times the same.")
    flags.DEFINE_integer("top_k", 0, "Draw from that many; 0 for all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens of that probability together; 1 for all.")
    flags.DEFINE_float("min_p", 0.0, "Leave out what has less than that share of the likeliest; 0 for none.")
    flags.DEFINE_integer("batch_size", 32, "Rows generated at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_string("workdir", "runs/best_of_n", "Where everything is written.")
    flags.DEFINE_bool("force", False, "Use an adapter although it was trained on another base.")


# ------------------------------------------------------------------------------------------------- prompts and checks


def read_prompts(prompts: list[str], file: str | None) -> tuple[list[str], list[str | None]]:
    """The prompts, and the answers that a file of rows gives them."""
    if bool(prompts) == bool(file):
        raise FlagError("give either --prompt=TEXT or --file with a prompt a line.")
    path, texts, answers = Path(file or "").expanduser(), list(prompts), [None] * len(prompts)
    if path.suffix in (".json", ".jsonl"):
        for where, row in read_records(path):
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise DataError(f'{where}: expected an object like {{"prompt": "...", "answer": "..."}}')
            texts.append(row["prompt"])
            answers.append(None if row.get("answer") is None else str(row["answer"]).strip())
    elif file:
        try:
            texts = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None
        answers = [None] * len(texts)
    there = [(text, answer) for text, answer in zip(texts, answers, strict=True) if text.strip()]
    if not there:
        raise DataError(f"{path}: there is no prompt.")
    return [text for text, _ in there], [answer for _, answer in there]


def checker(name: str, answers: Sequence[str | None]) -> rewards.RewardFn:
    """A reward function of 1 and 0, for completions in the order of `answers`; None without an answer to compare."""
    kind, _, pattern = name.partition(":")
    if kind == "regex" and pattern:
        try:
            wanted = re.compile(pattern)
        except re.error as error:
            raise FlagError(f"--check: {pattern!r} is not a regular expression: {error}.") from None
        return lambda prompts, completions: [float(wanted.search(c) is not None) for c in completions]
    tests: dict[str, Callable[[str, str], bool]] = {
        "contains": lambda said, answer: answer in said,
        "equals": lambda said, answer: said.strip() == answer,
        "number": lambda said, answer: last_number(said) is not None and last_number(said) == last_number(answer),
    }
    if name not in tests:
        raise FlagError(f"unknown check {name!r}.{did_you_mean(name, CHECKS)}")
    if not any(answers):
        raise DataError(f"--check={name} needs rows with an answer: give --file=ROWS.jsonl.")
    test = lambda said, answer: None if answer is None else float(tests[name](said, answer))  # noqa: E731
    return lambda prompts, completions: [test(c, a) for c, a in zip(completions, answers, strict=True)]


def last_number(said: str) -> float | None:
    """The last number of a text; "1,234" is one."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", said)
    return float(found[-1].replace(",", "")) if found else None


# ------------------------------------------------------------------------------------------------- samples


def sample(
    base: Pretrained, variables: dict, asked: Sequence[np.ndarray], encoder: preferences.Encoder, n: int, rows: int,
    seed: int, max_new: int, sampling: Sampling,
) -> list[list[str]]:  # fmt: skip
    """n texts for each prompt of token ids. All batches have one shape, so there is one compilation."""
    flat, width = [row for row in asked for _ in range(n)], -(-max(map(len, asked)) // 32) * 32
    rows = min(rows, len(flat))
    run = jax.jit(
        lambda v, tokens, mask, rng: decode(
            base.model, v, tokens, mask, rng, max_new=max_new, sampling=sampling, stop=encoder.stop
        )
    )
    texts = []
    for number, first in enumerate(range(0, len(flat), rows)):
        here = (flat[first : first + rows] + flat[:rows])[:rows]
        tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
        for i, row in enumerate(here):
            tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        out = jax.device_get(run(variables, tokens, mask, jax.random.fold_in(jax.random.key(seed), number)))
        said = [out.tokens[i, : out.mask[i].sum()] for i in range(rows)]
        texts += [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        print(f"{min(first + rows, len(flat))} of {len(flat)} samples", flush=True)
    return [texts[i * n : (i + 1) * n] for i in range(len(asked))]


def curve(table: np.ndarray) -> list[dict[str, float]]:
    """What the best of k scores in the mean over prompts, for k = 1, 2, 4, ... n. table [P, n], all finite."""
    n = table.shape[1]
    sizes = sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})
    return [
        {"n": k, "kl": rewards.best_of_kl(k), "score": float(rewards.expected_best(table, k).mean())} for k in sizes
    ]


def draw(points: list[dict[str, float]], png: Path) -> None:
    """Score against KL."""
    figure = plot.figure(5, 3.6)
    axes = figure.add_subplot()
    axes.plot([p["kl"] for p in points], [p["score"] for p in points], marker="o")
    for p in points:
        axes.annotate(f"n={p['n']}", (p["kl"], p["score"]), (4, -10), textcoords="offset points", fontsize=7)
    axes.set(xlabel="KL from the policy, at most (nats)", ylabel="score of the best of n")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    plot.save(figure, png)


# ------------------------------------------------------------------------------------------------- the script


def main() -> None:
    values = flags.FLAGS
    sampling = Sampling(**common.flag_values("temperature", "top_k", "top_p", "min_p"))
    if values.reward is None and values.check is None:
        raise FlagError("nothing scores the samples: give --reward=ADAPTER, --check, or both.")
    texts, answers = read_prompts(values.prompt, values.file)
    if values.check is not None:
        checker(values.check, answers)  # a wrong one is told before anything is loaded
    functions = {}
    if values.reward is not None:
        functions["reward"] = reward_model.load_reward(values.reward, values.reward_model, values.force)
    workdir = Path(values.workdir).expanduser()
    with lock(workdir):
        base = load_model(values.model, values.quantise, **common.model_options())
        variables, encoder = adapted(base, values), preferences.Encoder(base.tokenizer, values.template)
        asked = [encoder.prompt([{"role": "user", "content": text}]) for text in texts]
        kept = fitting(base, asked, values.max_new)
        texts, asked, answers = ([x[i] for i in kept] for x in (texts, asked, answers))
        if values.check is not None:
            functions["check"] = checker(values.check, [a for a in answers for _ in range(values.n)])
        drawn = sample(
            base, variables, asked, encoder, values.n, values.batch_size, values.seed, values.max_new, sampling
        )  # fmt: skip
        flat = [(p, c) for p, each in zip(texts, drawn, strict=True) for c in each]
        scored = rewards.score(functions, *map(list, zip(*flat, strict=True)))
        common.write_config(workdir)
        write(workdir, texts, drawn, scored.total.reshape(len(texts), values.n), scored.unscored)


def adapted(base: Pretrained, values: Any) -> dict:
    """The policy's variables, realised."""
    if values.adapter is None:
        return {"params": base.params}
    loaded, sites = adapters.load(values.adapter), peft.sites(base.model)
    attached = adapters.attach(loaded, base.params, sites, base.fingerprint, values.force)
    return peft.realised(loaded.method, attached, sites)


def fitting(base: Pretrained, asked: Sequence[np.ndarray], max_new: int) -> list[int]:
    """The numbers of the prompts that leave room for an answer; the others are counted. DataError if none does."""
    most = base.config.max_positions - max_new
    kept = [i for i, ids in enumerate(asked) if 0 < len(ids) <= most]
    if not kept:
        raise DataError(f"no prompt leaves room: with --max_new={max_new} at most {max(most, 0)} tokens fit.")
    if len(kept) < len(asked):
        print(f"{len(asked) - len(kept)} prompts left out: more than {most} tokens, or none")
    return kept


def write(workdir: Path, texts: list[str], drawn: list[list[str]], table: np.ndarray, unscored: dict) -> None:
    """best.jsonl, pairs.jsonl, result.json and the plot, from scores [P, n]; prints a summary."""
    for name, count in unscored.items():
        if count:
            print(f"{count} of {table.size} samples can't be scored by {name}")
    some, whole = np.isfinite(table).any(axis=1), np.isfinite(table).all(axis=1)
    if not some.any():
        raise DataError("no sample of any prompt could be scored.")
    best, worst, differ = best_and_worst(table)
    rows = [
        {"prompt": texts[i], "text": drawn[i][best[i]], "score": float(table[i, best[i]]), "mean": float(mean)}
        for i, mean in zip(np.flatnonzero(some), np.nanmean(table[some], axis=1), strict=True)
    ]
    pairs = [
        {"prompt": texts[i], "chosen": drawn[i][best[i]], "rejected": drawn[i][worst[i]]}
        for i in np.flatnonzero(some & differ)
        if drawn[i][worst[i]].strip() and drawn[i][best[i]].strip()
    ]
    for name, found in (("best", rows), ("pairs", pairs)):
        write_text(workdir / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found))
    n, points = table.shape[1], curve(table[whole]) if whole.any() else []
    result = {"n": n, "prompts": len(rows), "left_out": int((~some).sum()), "kl": rewards.best_of_kl(n)}
    result |= {"mean": float(np.nanmean(table)), "best": float(np.mean([r["score"] for r in rows])), "curve": points}
    common.write_json(workdir / "result.json", result | {"unscored": unscored, "pairs": len(pairs)})
    if points:
        draw(points, workdir / "best_of_n.png")
        cells = [[p["n"], f"{p['kl']:.4f}", f"{p['score']:.4f}"] for p in points]
        print(tabulate(cells, headers=["n", "KL, nats, at most", "score"], tablefmt="github", disable_numparse=True))
    for row in rows[:3]:
        print(f"{row['score']:+.3f}  {row['prompt']}{row['text']}".replace("\n", " "))
    told = f"log {n} - {n - 1}/{n} = {rewards.best_of_kl(n):.6f} nats of KL"
    print(f"best of {n} scores {result['best']:.4f}, a sample {result['mean']:.4f}, for at most {told}")
    print(f"written: {workdir / 'best.jsonl'}, and {len(pairs)} pairs of best and worst")


if __name__ == "__main__":
    define_flags()
    common.run(main)
