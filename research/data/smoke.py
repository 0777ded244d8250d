"""200 short sentences in two balanced classes and a small tokenizer for them: no network is needed."""

from collections.abc import Iterator

CLASS_NAMES = ("negative", "positive")

_SUBJECTS = (  # these leave about as many of either class in the test and validation parts
    "the fish soup",
    "the tour guide",
    "the old piano",
    "this bakery",
    "the last train",
    "my bicycle",
    "the museum",
    "her garden",
    "the school play",
    "that small hotel",
)
_PREDICATES = {
    "negative": (
        "was a sad disappointment",
        "made everybody angry",
        "looked dirty and neglected",
        "spoilt the whole evening",
        "was far too loud",
        "seemed dull from the start",
        "gave us nothing but trouble",
        "was the worst part of the week",
        "left a bitter memory",
        "is not worth the money",
    ),
    "positive": (
        "was a lovely surprise",
        "made everybody smile",
        "looked clean and cared for",
        "saved the whole evening",
        "was pleasantly quiet",
        "seemed charming from the start",
        "gave us nothing but joy",
        "was the best part of the week",
        "left a warm memory",
        "is worth every penny",
    ),
}


def sentences() -> Iterator[tuple[str, str]]:
    """Yields (text, class name): every subject with every predicate, the classes in turn."""
    for row, subject in enumerate(_SUBJECTS):
        for column in range(len(_SUBJECTS)):
            for name in CLASS_NAMES:
                predicate = _PREDICATES[name][(row + column) % len(_PREDICATES[name])]
                yield f"{subject.capitalize()} {predicate}.", name


def smoke_tokenizer():
    """Returns a `PreTrainedTokenizerFast` of whole lower-case words: "[CLS] ... [SEP]", [PAD] 0, [UNK] 1."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    words = sorted({word for text, _ in sentences() for word in text.lower().replace(".", " .").split()})
    vocabulary = {word: number for number, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    roles = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **roles)
