"""Conversations to tokens through a chat template, with a mask of what the assistant said.

The mask needs no {% generation %} mark in the template: an answer is what rendering with it adds to its prompt,

    ids(messages[:i], generation prompt)  is a prefix of  ids(messages[:i + 1])  is a prefix of  ids(messages),

and this is checked for every answer. The token that closes the assistant's turn is in the mask, white space that a
template puts behind it is not. Nothing is ever found by a pad id, which may well be the closing token.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from research.data.instructions import Message
from research.errors import DataError, ModelError, did_you_mean

_PLAIN = (
    "{{% for m in messages %}}{{% if m['role'] == 'system' %}}{{{{ m['content'] + '\n' }}}}"
    "{{% elif m['role'] == 'user' %}}{{{{ '{user}' + m['content'] + '\n' }}}}"
    "{{% else %}}{{{{ '{assistant}' + '{gap}' + m['content'] + eos_token + '\n' }}}}{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '{assistant}' }}}}{{% endif %}}"
)
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The space belongs to the answer: a byte-level tokenizer makes one token of it and the first word.
    "plain": _PLAIN.format(user="Human: ", assistant="Assistant:", gap=" "),
    "plain/zh": _PLAIN.format(user="人：", assistant="机器人：", gap=""),
}
PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True)
class Encoded:
    """One conversation: tokens and loss_mask, int32 [T]; loss_mask is 1 on what the assistant said."""

    tokens: np.ndarray
    loss_mask: np.ndarray


class PrefixError(DataError):
    """The tokens of a prompt are not those that the conversation starts with."""


class Chat:
    """A tokenizer with a chat template.

    Args:
      tokenizer: a `transformers` fast tokenizer.
      template: "chatml", "plain" or "plain/zh"; default the tokenizer's own.

    Raises ModelError: no template, an unknown one, one without a generation prompt or a token that closes a turn.
    """

    def __init__(self, tokenizer, template: str | None = None):
        self.tokenizer = tokenizer
        if template is not None and template not in TEMPLATES:
            raise ModelError(f"unknown chat template {template!r}.{did_you_mean(template, TEMPLATES)}")
        self.name, self.source = template or "its own", TEMPLATES[template] if template else tokenizer.chat_template
        if not self.source:
            raise ModelError(f"the tokenizer has no chat template: name one. Valid: {', '.join(TEMPLATES)}.")
        if not isinstance(self.source, str):
            raise ModelError("the tokenizer has several chat templates: keep one, or name one of ours")
        if template and template.startswith("plain") and not tokenizer.eos_token:
            raise ModelError(
                f"chat template {template!r} closes a turn with the end-of-text token; this tokenizer has none"
            )
        asked = self.text(PROBE[:1])
        if self.text(PROBE[:1], generation_prompt=True) == asked:
            raise ModelError(f"the chat template ({self.name}) has no generation prompt, so no answer can be asked for")
        self.closing  # noqa: B018 - raises here rather than at the first row

    def text(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Returns the rendered conversation. Raises ModelError where the template refuses it."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.source, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # jinja2's and whatever a template raises by itself
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ModelError(f"the chat template ({self.name}) refuses a conversation: {reason}") from error

    def ids(self, text: str) -> list[int]:
        """Returns the tokens of rendered text, which holds its special tokens already."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def closing(self) -> int:
        """The token that closes the assistant's turn."""
        prompt, whole = self.text(PROBE[:1], generation_prompt=True), self.text(PROBE)
        if not whole.startswith(prompt):
            raise ModelError(f"the chat template ({self.name}) is not prefix-stable: an answer changes its own prompt")
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        for token in self.ids(whole[len(prompt) :]):
            if token in special:
                return token
        raise ModelError(f"the chat template ({self.name}) closes an answer with no special token of this tokenizer")

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a generated answer: the closing one and the tokenizer's end of text."""
        end = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([self.closing, *([] if end is None else [end])]))

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Returns the tokens [T] int32 that ask for the next answer."""
        return np.asarray(self.ids(self.text(messages, generation_prompt=True)), np.int32)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Returns the tokens of a conversation and which of them the assistant said.

        Raises ModelError for a template that is not prefix-stable, PrefixError where a token lies across the border of
        prompt and answer.
        """
        whole = self.text(messages)
        tokens = self.ids(whole)
        mask = np.zeros(len(tokens), np.int32)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._prefix(self.text(messages[:turn], generation_prompt=True), whole, tokens, turn)
            stop = self._prefix(self.text(messages[: turn + 1]), whole, tokens, turn)
            ends = [place for place in range(start, stop) if tokens[place] == self.closing]
            if not ends:
                raise ModelError(f"the chat template ({self.name}) does not close the answer of message {turn + 1}")
            mask[start : ends[-1] + 1] = 1
        return Encoded(np.asarray(tokens, np.int32), mask)

    def _prefix(self, text: str, whole: str, tokens: list[int], turn: int) -> int:
        if not whole.startswith(text):
            raise ModelError(
                f"the chat template ({self.name}) is not prefix-stable at message {turn + 1}: "
                f"later messages change what comes before ({text[-30:]!r})"
            )
        ids = self.ids(text)
        if tokens[: len(ids)] != ids:
            raise PrefixError(f"a token lies across the border of message {turn + 1}: prompt and answer share it")
        return len(ids)

    def encode_all(self, conversations: Iterable[Sequence[Message]]) -> tuple[list[Encoded], dict[str, int]]:
        """Returns the encoded conversations, and counts of those left out. Raises DataError if none is left."""
        encoded, dropped = [], Counter()
        for messages in conversations:
            try:
                encoded.append(self.encode(messages))
            except PrefixError:
                dropped["a token lies across the border of prompt and answer"] += 1
        if not encoded:
            raise DataError(f"no conversation could be encoded: {dict(dropped) or 'there is none'}")
        return encoded, dict(dropped)
