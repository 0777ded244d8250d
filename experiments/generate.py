"""Continues prompts with a language model and, if given, an adapter; or talks.

    python -m experiments.generate --prompt="The capital of France is"
    python -m experiments.generate --chat --prompt="Name three rivers." --temperature=0.7 --top_p=0.9
    python -m experiments.generate --adapter=runs/sft/adapter --file=prompts.txt    # a prompt a line, one batch
    python -m experiments.generate --adapter=runs/a,runs/b --prompt="It is"         # each by both, in one batch
    python -m experiments.generate --adapter=runs/sft/adapter --interactive         # a chat with history, as it comes
    cat prompts.txt | python -m experiments.generate --output=answers.jsonl

The base is the one that the adapter names. All prompts are one batch, padded on the left: a row's text does not depend
on its neighbours. Prints the texts; `--output` writes JSON lines with prompt, text, tokens and log-probability. Says on
stderr how long compilation and the tokens took. An interactive chat is a line a turn; an empty line begins anew.
Differs from `classify --mode=predict`, which labels lines.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.shared import common, replies
from research.convert.load import Pretrained
from research.data.chat import Chat
from research.errors import DataError, FlagError, ModelError
from research.files import write_text
from research.generate.decode import Generated
from research.generate.sampling import Sampling
from research.models.t5 import T5Config
from research.peft import adapter as adapters
from research.peft import method as peft

DEFAULT_MODEL = "smollm2-135m-instruct"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram")


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags(None)
    flags.DEFINE_list(
        "adapter",
        [],
        "Adapter directory; several, apart by commas and of one specification, each answer every prompt in one batch. "
        f"The first names the default of --model, else {DEFAULT_MODEL}.",
    )
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
    flags.DEFINE_string("file", None, "A prompt a line. Default, where no --prompt is given: stdin.")
    flags.DEFINE_bool("chat", False, "Put each prompt into the chat template as the user's turn.")
    flags.DEFINE_bool("interactive", False, "Talk: a line of stdin a turn, answered as it is made, with history.")
    flags.DEFINE_string(
        "template", None, "chatml, plain or plain/zh. Default: the adapter's, else the tokenizer's own."
    )
    flags.DEFINE_string("output", None, "JSON lines to write.")
    flags.DEFINE_integer("max_new", 64, "Most tokens to add.", lower_bound=1)
    flags.DEFINE_multi_string(
        "stop", [], "A text that ends a continuation and is left out; may be given several times."
    )
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Draw from that many; 0 for all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens of that probability together; 1 for all.")
    flags.DEFINE_float("min_p", 0.0, "Leave out what has less than that share of the likeliest; 0 for none.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 what was said already is less likely.")
    flags.DEFINE_integer("no_repeat_ngram", 0, "No so many tokens in a row twice; 0 for no such rule.")
    flags.DEFINE_integer("beams", 1, "Search so wide for the likeliest text instead of drawing.", lower_bound=1)
    flags.DEFINE_float("length_penalty", 1.0, "With --beams: above 0 long texts gain, below 0 short ones.")
    flags.DEFINE_integer("seed", 0, "Of the draws.")
    flags.DEFINE_bool("force", False, "Use the adapter although it was trained on another base.")


def main() -> None:
    values = flags.FLAGS
    sampling = Sampling(**common.flag_values(*SAMPLING))
    if values.interactive and (given := [n for n in ("prompt", "file", "output") if values[n].value]):
        raise FlagError(f"--interactive reads stdin and writes stdout: leave out --{given[0]}.")
    if values.beams > 1 and (given := [n for n in (*SAMPLING, "interactive") if not values[n].using_default_value]):
        raise FlagError(f"--beams searches for the likeliest text: leave out --{given[0]}.")
    if values.interactive and len(values.adapter) > 1:
        raise FlagError("--interactive is with one adapter.")
    if "" in values.stop:
        raise FlagError("--stop is empty: it takes a text.")
    texts = [] if values.interactive else prompts(values)
    loaded = [adapters.load(directory) for directory in values.adapter]
    name = values.model or (loaded[0].meta["base"]["name"] if loaded else DEFAULT_MODEL)
    options = common.model_options()
    base = replies.load_model(name, values.quantise, encoder_decoder=True, **options)
    variables = [adapted(base, one, values.force) for one in loaded or [None]]
    chat = None
    if values.chat or values.interactive:
        chat = replies.chat_of(base, values.template or (replies.template_of(loaded[0].meta) if loaded else None))
    if values.interactive:
        return talk(base, variables[0], chat, sampling, values)
    ids = [encoded(base, chat, text) for text in texts]
    end = base.tokenizer.eos_token_id
    stop = chat.stop_tokens if chat else () if end is None else (end,)
    each, count = variables[0], len(variables)
    if count > 1:  # every prompt by every adapter, in the adapters' order
        each = [v for _ in ids for v in variables]
        ids, texts = ([x for x in several for _ in variables] for several in (ids, texts))
    more = (values.seed, values.beams, values.length_penalty)
    out, compiling, running = replies.decode(base, each, ids, values.max_new, sampling, stop, *more)
    made = int(out.mask.sum())
    print(
        f"compiled in {compiling:.1f} s; {len(texts)} prompt(s) and {made} new tokens in {running:.1f} s: "
        f"{made / running:.1f} tokens/s",
        file=sys.stderr,
    )
    rows = [record(base, text, out, row, values.stop) for row, text in enumerate(texts)]
    for place, row in enumerate(rows):
        if count > 1:
            row["adapter"] = values.adapter[place % count]
        front = f"{row['adapter']}: " if count > 1 else ""
        print(front + (row["text"] if chat or isinstance(base.config, T5Config) else row["prompt"] + row["text"]))
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


def adapted(base: Pretrained, loaded: adapters.Adapter | None, force: bool) -> dict:
    """The variables that the model is applied with, realised."""
    if loaded is None:
        return {"params": base.params}
    if loaded.meta.get("task") == "classify":
        raise ModelError("the adapter is a classifier: python -m experiments.classify --mode=predict uses it.")
    sites = peft.sites(base.model)
    return peft.realised(loaded.method, adapters.attach(loaded, base.params, sites, base.fingerprint, force), sites)


def encoded(base: Pretrained, chat: Chat | None, text: str) -> Any:
    """The token ids of a prompt."""
    if chat is not None:
        return chat.prompt([{"role": "user", "content": text}])
    return base.tokenizer(text)["input_ids"]


def record(base: Pretrained, prompt: str, out: Generated, row: int, stops: list[str]) -> dict[str, Any]:
    """A row of --output, up to the first stop string."""
    ids = out.tokens[row, : out.mask[row].sum()].tolist()
    decode = lambda count: base.tokenizer.decode(ids[:count], skip_special_tokens=True)  # noqa: E731
    text = replies.cut(decode(len(ids)), stops)
    kept = len(ids)
    if text != decode(kept):
        kept = next(count for count in range(1, kept + 1) if any(stop in decode(count) for stop in stops))
    logprob = float(out.logprobs[row, :kept].sum())
    return {"prompt": prompt, "text": text, "tokens": ids[:kept], "logprob": logprob}


def talk(base: Pretrained, variables: dict, chat: Chat, sampling: Sampling, values: Any) -> None:
    """A chat: each answer is printed token by token, and the next question has all before it in front."""
    stream = replies.streamer(base, variables, values.max_new, sampling, chat.stop_tokens)
    show = lambda text: print(text, end="", flush=True)  # noqa: E731
    history, rng = [], jax.random.key(values.seed)
    if sys.stdin.isatty():
        print("one line a turn; an empty one begins anew; Ctrl-D ends", file=sys.stderr)
    turn = 0
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if not (text := line.strip()):
            history = []
            continue
        history.append({"role": "user", "content": text})
        ids = chat.prompt(history)
        while len(history) > 2 and len(ids) > base.config.max_positions - values.max_new:
            history = history[2:]  # the oldest question and its answer
            ids = chat.prompt(history)
        said = replies.spoken(base, stream(ids, jax.random.fold_in(rng, turn)), values.stop, show)
        show("\n")
        history.append({"role": "assistant", "content": said})
        turn += 1


if __name__ == "__main__":
    define_flags()
    common.run(main)
