"""Tokenizers from GGUF metadata, rebuilt with `tokenizers`: byte-level BPE by its merges, and SentencePiece's, which
merges what gives the token with the best score.
"""

from typing import Any

from research.errors import ModelError, did_you_mean

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before BPE, by `tokenizer.ggml.pre`: single digits and GPT-2's rule, or a rule of its own.
SPLITS = {
    "smollm": None,
    "qwen2": _QWEN_SPLIT,
    "llama-bpe": _QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


def build(meta: dict[str, Any], label: str) -> Any:
    """A transformers.PreTrainedTokenizerFast, chat template included. ModelError for a kind that is not supported."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    get = {key.removeprefix("tokenizer."): value for key, value in meta.items()}.get
    kind, tokens = get("ggml.model"), get("ggml.tokens", [])
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{label}: GGUF tokenizer model {kind!r} is not supported. Valid: gpt2, llama.")
    bpe = (_byte_level if kind == "gpt2" else _sentencepiece)(get, tokens, label)
    added = [
        AddedToken(token, special=type_ == _CONTROL, normalized=False)
        for token, type_ in zip(tokens, get("ggml.token_type", []), strict=False)
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    bpe.add_tokens(added)  # in one call: each builds the matcher of all again, and Gemma has 6,414
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    roles = {role: get(f"ggml.{name}_token_id") for name, role in names.items()}
    roles = {role: tokens[i] for role, i in roles.items() if i is not None and i < len(tokens)}
    if (bos := roles.get("bos_token")) and get("ggml.add_bos_token", get("ggml.pre") == "llama-bpe"):
        special = [(bos, tokens.index(bos))]
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", special)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **roles)
    fast.chat_template = get("chat_template")
    return fast


def _byte_level(get: Any, tokens: list[str], label: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = get("ggml.pre", "default")
    if pre not in SPLITS:
        raise ModelError(f"{label}: GGUF pre-tokenizer {pre!r} is not supported.{did_you_mean(pre, SPLITS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in get("ggml.merges", [])]
    # With ignore_merges a word that is a token is taken whole: Llama 3's vocabulary was cut from tiktoken ranks.
    words = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(words, merges, ignore_merges=pre == "llama-bpe"))
    if SPLITS[pre] is None:
        cut, rule = pre_tokenizers.Digits(individual_digits=True), True
    else:
        cut, rule = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"), False
    bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule)])
    bpe.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    return bpe


def _sentencepiece(get: Any, tokens: list[str], label: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores, types, words = get("ggml.scores", []), get("ggml.token_type", []), {t: i for i, t in enumerate(tokens)}
    if len(scores) != len(tokens):
        raise ModelError(f"{label}: {len(scores)} scores for {len(tokens)} tokens.")
    found = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _NORMAL and len(token) > 1:
            cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
            found += [(-scores[i], i, words[a], words[b]) for a, b in cuts if a in words and b in words]
    merges = [(tokens[a], tokens[b]) for *_, a, b in sorted(found)]
    unknown = tokens[get("ggml.unknown_token_id", 0)]
    bpe = Tokenizer(models.BPE(words, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    front = [normalizers.Prepend("\u2581")] if get("ggml.add_space_prefix", True) else []
    bpe.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "\u2581")])
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if front else []
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    bpe.decoder = decoders.Sequence(parts)
    return bpe
