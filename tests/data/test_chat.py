import functools

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from research.data.chat import TEMPLATES, Chat
from research.errors import DataError, ModelError

SPECIAL = ("<|im_start|>", "<|im_end|>")
TALK = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "再见"},
)


@functools.cache
def tokenizer(template=None, merges=(), special=SPECIAL):
    """A byte-level tokenizer whose pad token is its closing token, as SmolLM2's is."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*letters, *map("".join, merges)])}
    bpe = Tokenizer(models.BPE(vocabulary, list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, special=True) for text in special])
    roles = {"eos_token": special[-1], "pad_token": special[-1]} if special else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_mask_is_the_answers_with_their_closing_token(template):
    chat = Chat(tokenizer(), template)
    encoded = chat.encode(TALK)
    said = [token for token, kept in zip(encoded.tokens, encoded.loss_mask, strict=True) if kept]
    gap = " " if template == "plain" else ""
    assert tokenizer().decode(said) == f"{gap}Hello there<|im_end|>{gap}再见<|im_end|>"
    assert tokenizer().decode(encoded.tokens) == chat.text(TALK)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_learnt_follows_what_generation_is_given(template):
    chat = Chat(tokenizer(), template)
    encoded, prompt = chat.encode(TALK), chat.prompt(TALK[:-1])
    assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.loss_mask[len(prompt) - 1 : len(prompt) + 1].tolist() == [0, 1]
    assert chat.stop_tokens == (tokenizer().convert_tokens_to_ids("<|im_end|>"),)


def test_named_templates_read_as_published():
    assert Chat(tokenizer(), "plain/zh").text(TALK[1:2], True) == "人：Hi\n机器人："
    assert (
        Chat(tokenizer(), "chatml").text(TALK[1:2], True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_templates_that_cannot_ask_or_close_are_refused():
    ask = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for template, said in [
        (None, "no chat template: name one"),
        (ask, "no generation prompt"),
        (ask + "{% if add_generation_prompt %}:{% endif %}", "not prefix-stable"),
        (ask + "{{ raise_exception('only pairs') }}", "only pairs"),
    ]:
        with pytest.raises(ModelError, match=said):
            Chat(tokenizer(template))
    with pytest.raises(ModelError, match="Did you mean 'chatml'"):
        Chat(tokenizer(), "chatlm")
    with pytest.raises(ModelError, match="closes an answer with no special token"):
        Chat(tokenizer(special=()), "chatml")
    with pytest.raises(ModelError, match="no system"):
        ours = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        Chat(tokenizer(ours + TEMPLATES["chatml"])).encode(TALK)


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name():
    forgetful = TEMPLATES["chatml"].replace(
        "m['content']", "(m['content'] if loop.index > messages|length - 2 else '')"
    )
    chat = Chat(tokenizer(forgetful))
    with pytest.raises(ModelError, match="not prefix-stable at message 3"):
        chat.encode(TALK)


def test_a_token_across_the_border_drops_its_row_and_is_counted():
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\n")[0][0]
    chat = Chat(tokenizer(merges=((newline, "!"),)), "chatml")
    bad = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "!"})
    with pytest.raises(DataError, match="border of message 2"):
        chat.encode(bad)
    encoded, dropped = chat.encode_all([TALK, bad])
    assert (len(encoded), list(dropped.values())) == (1, [1])
    with pytest.raises(DataError, match="no conversation could be encoded"):
        chat.encode_all([bad])


@pytest.mark.assets
@pytest.mark.slow
def test_smollm2_learns_to_end_its_turn():
    from research.convert.gguf import GGUFSource
    from research.data import instructions
    from research.data.assets import fetch

    home = fetch("smollm2-135m-instruct")
    fast = GGUFSource(next(home.glob("*.gguf"))).tokenizer()
    chat = Chat(fast)
    encoded, dropped = chat.encode_all(c.messages for c in instructions.load("alpaca").kept[::20])
    assert sum(dropped.values()) <= 2
    for example in encoded:
        last = example.tokens[example.loss_mask == 1][-1]
        assert last == fast.convert_tokens_to_ids("<|im_end|>") == fast.pad_token_id
