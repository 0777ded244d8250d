"""Continues prompts with a language model and, if given, an adapter.

    python -m experiments.generate --prompt="The capital of France is"
    python -m experiments.generate --chat --prompt="Name three rivers." --temperature=0.7 --top_p=0.9
    python -m experiments.generate --file=prompts.txt --adapter=runs/sft/adapter    # a prompt a line, one batch
    cat prompts.txt | python -m experiments.generate --output=answers.jsonl

All prompts are one batch, padded on the left: a row's text does not depend on its neighbours. Prints the texts;
`--output` writes JSON lines with prompt, text, tokens and log-probability. Says how long compilation, the prompts and a
token took, on stderr. Differs from `classify --mode=predict`, which labels lines.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from research.convert.load import Pretrained, load
from research.errors import DataError, FlagError, ModelError
from research.files import write_text
from research.generate.decode import Generated, generate
from research.generate.sampling import Sampling
from research.peft import adapter as adapters
from research.peft import method as peft


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags("smollm2-135m-instruct")
    flags.DEFINE_string("adapter", None, "Adapter directory.")
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
    flags.DEFINE_string("file", None, "A prompt a line. Default, where no --prompt is given: stdin.")
    flags.DEFINE_bool("chat", False, "Put each prompt into the model's chat template as the user's turn.")
    flags.DEFINE_string("output", None, "JSON lines to write.")
    flags.DEFINE_integer("max_new", 64, "Most tokens to add.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Draw from that many; 0 for all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens of that probability together; 1 for all.")
    flags.DEFINE_float("min_p", 0.0, "Leave out what has less than that share of the likeliest; 0 for none.")
    flags.DEFINE_integer("seed", 0, "Of the draws.")
    flags.DEFINE_bool("force", False, "Use the adapter although it was trained on another base.")


def main() -> None:
    values = flags.FLAGS
    names = ("temperature", "top_k", "top_p", "min_p")
    sampling = Sampling(**common.flag_values(*names))
    texts = prompts(values)
    base = load(values.model, dtype=values.dtype, untie=values.untie)
    if not hasattr(base.model, "unembed"):
        raise ModelError(f"{values.model} is no language model: it has no output projection to the vocabulary.")
    if base.tokenizer is None:
        raise ModelError(f"{values.model} has no tokenizer.")
    variables = adapted(base, values.adapter, values.force)
    tokens, mask = encode(base, texts, values.chat, values.max_new)
    stop = () if base.tokenizer.eos_token_id is None else (base.tokenizer.eos_token_id,)
    run = jax.jit(
        lambda v, tokens, mask, rng: generate(
            base.model, v, tokens, mask, rng, max_new=values.max_new, sampling=sampling, stop=stop
        )
    )
    start = time.perf_counter()
    program = run.lower(variables, tokens, mask, jax.random.key(values.seed)).compile()
    ready = time.perf_counter()
    out = jax.tree.map(np.asarray, program(variables, tokens, mask, jax.random.key(values.seed)))
    seconds, made = time.perf_counter() - ready, int(out.mask.sum())
    print(
        f"compiled in {ready - start:.1f} s; {len(texts)} prompt(s) and {made} new tokens in {seconds:.1f} s: "
        f"{made / seconds:.1f} tokens/s",
        file=sys.stderr,
    )
    rows = [record(base, text, out, row) for row, text in enumerate(texts)]
    for row in rows:
        print(row["text"] if values.chat else row["prompt"] + row["text"])
    if values.output:
        write_text(Path(values.output), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def prompts(values: Any) -> list[str]:
    """What the flags name, or stdin's lines. DataError where there is none."""
    if values.prompt and values.file:
        raise FlagError("--prompt and --file exclude each other.")
    if values.prompt:
        lines = values.prompt
    elif values.file:
        try:
            lines = Path(values.file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise DataError(f"cannot read {values.file}: {getattr(error, 'strerror', None) or error}.") from None
    else:
        lines = [line.rstrip("\n") for line in sys.stdin]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise DataError("there is no prompt: give --prompt=TEXT, or --file with a prompt a line.")
    return lines


def adapted(base: Pretrained, directory: str | None, force: bool) -> dict:
    """The variables that the model is applied with, realised."""
    if directory is None:
        return {"params": base.params}
    loaded, sites = adapters.load(directory), peft.sites(base.model)
    return peft.realised(loaded.method, adapters.attach(loaded, base.params, sites, base.fingerprint, force), sites)


def encode(base: Pretrained, texts: list[str], chat: bool, max_new: int) -> tuple[jax.Array, jax.Array]:
    """Token ids and mask [B, T], padded on the left to a multiple of 32, so that few lengths are compiled.

    DataError for a prompt that leaves no room; ModelError for a chat without a template.
    """
    tokenizer = base.tokenizer
    if chat and not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {base.name} has no chat template: leave --chat out.")
    if chat:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
    rows = [tokenizer(text, add_special_tokens=not chat)["input_ids"] for text in texts]
    length = -(-max(len(row) for row in rows) // 32) * 32
    most = base.config.max_positions - max_new
    for number, row in enumerate(rows, 1):
        if not row:
            raise DataError(f"prompt {number} has no tokens.")
        if len(row) > most:
            raise DataError(
                f"prompt {number} has {len(row)} tokens: the model has {base.config.max_positions} positions, so with "
                f"--max_new={max_new} at most {most} fit."
            )
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return jnp.asarray(tokens), jnp.asarray(mask)


def record(base: Pretrained, prompt: str, out: Generated, row: int) -> dict[str, Any]:
    """A row of --output."""
    ids = out.tokens[row, : out.mask[row].sum()].tolist()
    text = base.tokenizer.decode(ids, skip_special_tokens=True)
    return {"prompt": prompt, "text": text, "tokens": ids, "logprob": float(out.logprobs[row].sum())}


if __name__ == "__main__":
    define_flags()
    common.run(main)
