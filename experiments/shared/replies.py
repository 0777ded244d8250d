"""Answers of a language model: in a batch, or token by token. What `generate`, `sft` and `prompt_tuning` share."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.classification import check_length
from experiments.shared.training import load_base
from research.convert.load import Pretrained
from research.data.chat import Chat
from research.data.instructions import Message
from research.errors import DataError, ModelError
from research.generate import cache as caches
from research.generate.beams import search
from research.generate.decode import Generated, generate
from research.generate.sampling import GREEDY, Sampling
from research.models.t5 import T5Config
from research.peft import rows, tree


def load_model(
    name: str, quantise: str | None = None, mesh: Any = None, *, encoder_decoder: bool = False, **options: Any
) -> Pretrained:
    """`training.load_base` of a language model. Raises ModelError for any other; `encoder_decoder`: T5 is one too."""
    base = load_base(name, quantise, mesh, **options)
    if not hasattr(base.model, "unembed"):
        raise ModelError(f"{name} is no language model: it has no output projection to the vocabulary.")
    if isinstance(base.config, T5Config) and not encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder: this script takes decoders, such as smollm2-135m-instruct.")
    return base


def closing(tokenizer: Any) -> Any:
    """The tokenizer with an end of text: one of BERT's kind closes answers with its separator."""
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def chat_of(base: Pretrained, template: str | None) -> Chat:
    """The base's tokenizer with a chat template."""
    tokenizer = closing(base.tokenizer)
    chat = Chat(tokenizer, template)
    if chat.closing == tokenizer.unk_token_id:  # of a small vocabulary, which does not know what it was probed with
        chat.closing = tokenizer.eos_token_id
    return chat


def pad_left(base: Pretrained, ids: Sequence[Sequence[int]], max_new: int, added: Any = None, multiple: int = 32):
    """Token ids and mask int32 [B, T], padded on the left to a multiple, so that few lengths are compiled.

    DataError for a prompt without tokens or without room; FlagError where virtual tokens take that room.
    """
    most = base.config.max_positions - max_new
    for number, row in enumerate(ids, 1):
        if not len(row):
            raise DataError(f"prompt {number} has no tokens.")
        if len(row) > most:
            raise DataError(
                f"prompt {number} has {len(row)} tokens: the model has {base.config.max_positions} positions, so with "
                f"--max_new={max_new} at most {max(most, 0)} fit."
            )
    longest = max(len(row) for row in ids)
    check_length(base, added or {}, longest + max_new)
    length = -(-longest // multiple) * multiple
    tokens, mask = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), np.int32)
    for i, row in enumerate(ids):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return jnp.asarray(tokens), jnp.asarray(mask)


class Timed(NamedTuple):
    """What was generated, as numpy, and the seconds of compiling and of running."""

    out: Generated
    compiling: float
    running: float


def decode(
    base: Pretrained,
    variables: dict | Sequence[dict],
    ids: Sequence[Sequence[int]],
    max_new: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
    seed: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> Timed:
    """Continues rows of token ids in one batch.

    variables: realised; a sequence of them gives each row its own adapter. beams: above 1 the likeliest continuation
    that so wide a search finds, and nothing is drawn.
    """
    several = not isinstance(variables, dict)
    tokens, mask = pad_left(base, ids, max_new, (variables[0] if several else variables).get("peft"))

    def continued(v: dict, tokens: jax.Array, mask: jax.Array, rng: jax.Array) -> Generated:
        if beams == 1:
            return generate(base.model, v, tokens, mask, rng, max_new=max_new, sampling=sampling, stop=stop)
        options = {"beams": beams, "max_new": max_new, "stop": stop, "length_penalty": length_penalty}
        found = search(base.model, v, tokens, mask, **options)
        return Generated(found.tokens[:, 0], found.mask[:, 0], found.logprobs[:, 0])

    rng = jax.random.key(seed)
    if several:
        given, rng = rows.stack(variables), jax.random.split(rng, len(ids))
        one = lambda v, tokens, mask, rng: continued(v, tokens, mask, rng[0])  # noqa: E731
        run = lambda given, *args: rows.apply_rows(one, *given, np.arange(len(ids)), *args)  # noqa: E731
    else:
        given, run = variables, continued
    began = time.perf_counter()
    program = jax.jit(run).lower(given, tokens, mask, rng).compile()
    ready = time.perf_counter()
    out = jax.tree.map(tree.whole, program(given, tokens, mask, rng))
    return Timed(out, ready - began, time.perf_counter() - ready)


def answers(
    base: Pretrained,
    chat: Chat,
    variables: dict,
    questions: Sequence[Sequence[Message]],
    max_new: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[str]:
    """The answers to conversations that end with a question."""
    if not questions:
        return []
    ids = [chat.prompt(messages) for messages in questions]
    out = decode(base, variables, ids, max_new, sampling, chat.stop_tokens, seed).out
    each = [out.tokens[row, : out.mask[row].sum()] for row in range(len(ids))]
    return [chat.tokenizer.decode(row, skip_special_tokens=True).strip() for row in each]


def streamer(
    base: Pretrained, variables: dict, max_new: int, sampling: Sampling, stop: Sequence[int]
) -> Callable[[Sequence[int], jax.Array], Iterator[int]]:
    """(token ids, rng) -> the tokens that `generate` gives this row alone, one by one, without the stop token."""
    pick = lambda rng, i, z: sampling.draw(jax.random.fold_in(jax.random.fold_in(rng, 0), i)[None], z)  # noqa: E731

    @jax.jit
    def first(v: dict, tokens: jax.Array, mask: jax.Array, rng: jax.Array) -> tuple:
        logits, cache = caches.prefill(base.model, v, tokens, mask, max_new)
        return pick(rng, 0, logits), cache

    def after(v: dict, cache: Any, token: jax.Array, i: jax.Array, rng: jax.Array) -> tuple:
        logits, cache = caches.step(base.model, v, cache, token, max_new - i + 1)
        return pick(rng, i, logits), cache

    after = jax.jit(after, donate_argnums=(1,))

    def stream(ids: Sequence[int], rng: jax.Array) -> Iterator[int]:
        token, cache = first(variables, *pad_left(base, [ids], max_new, variables.get("peft"), 128), rng)
        for i in itertools.count(1):
            found = int(token[0])
            if found in stop:
                return
            yield found
            if i == max_new:
                return
            token, cache = after(variables, cache, token, jnp.asarray(i), rng)

    return stream


def spoken(base: Pretrained, tokens: Iterator[int], stops: Sequence[str], show: Callable[[str], None]) -> str:
    """Shows tokens as text while they come, and returns the whole, up to the first stop string.

    What may still change is held back: a character of which some bytes are missing, and what may begin a stop string.
    """
    ids, shown = [], 0
    for token in tokens:
        ids.append(token)
        text = base.tokenizer.decode(ids, skip_special_tokens=True)
        if any(stop in text for stop in stops):
            break
        held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        ready = text[: len(text) - held].rstrip("\ufffd")
        show(ready[shown:])
        shown = max(shown, len(ready))
    text = cut(base.tokenizer.decode(ids, skip_special_tokens=True), stops)
    show(text[shown:])
    return text.strip()


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


def template_of(meta: dict[str, Any]) -> str | None:
    """The chat template that an adapter was trained with; None for the tokenizer's own."""
    template = meta.get("template")
    if not isinstance(template, str | None):
        raise ModelError(f"the adapter names chat template {template!r}, which is no name.")
    return template
