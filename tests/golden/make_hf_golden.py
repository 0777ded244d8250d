"""Writes the tiny Hugging Face models and the outputs that tests/convert compares with.

Run with an environment that has torch and transformers (made with torch 2.13, transformers 5.24):

    python tests/golden/make_hf_golden.py                                  # the tiny models
    python tests/golden/make_hf_golden.py --minilm DIR --smollm FILE.gguf   # also the outputs of the packaged weights
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers as hf

HERE = Path(__file__).parent
VOCAB = 120
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
GQA = SHARED | {"num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
THETA = {"rope_type": "default", "rope_theta": 1000.0}
ROBERTA = SHARED | {"max_position_embeddings": 42, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 40}
GPT2 |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
GEMMA = GQA | {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 3, "query_pre_attn_scalar": 12}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
ROPES = {"full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}, "sliding_attention": THETA}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3}
T5 |= {"num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
T5 |= {"decoder_start_token_id": 0, "initializer_factor": 0.3}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 24, "n_layer": 2, "n_head": 6, "initializer_range": 0.2}
MODELS = {
    "bert": (hf.BertModel, hf.BertConfig(**SHARED, max_position_embeddings=40), {}),
    "roberta": (hf.RobertaModel, hf.RobertaConfig(**ROBERTA), {"add_pooling_layer": False}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2), {}),
    # Six heads: slopes of a number that is no power of two.
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig(**BLOOM), {}),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GQA, rope_parameters=LLAMA3), {}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**GQA, sliding_window=8, rope_parameters=THETA), {}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**GQA, rope_parameters=THETA, tie_word_embeddings=True), {}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**GQA, head_dim=16, rope_parameters=THETA), {}),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**GEMMA, layer_types=KINDS, attn_logit_softcapping=2.0), {}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GEMMA, layer_types=KINDS, rope_parameters=ROPES), {}),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5, tie_word_embeddings=True), {}),
    "t5_1_1": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        {},
    ),
}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 12}
VIT |= {"patch_size": 4, "initializer_range": 0.2}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "ship"}, "label2id": {"cat": 0, "dog": 1, "ship": 2}}
IMAGES = {
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**VIT, **LABELS, layer_norm_eps=1e-6), {}),
    "vit_bare": (hf.ViTModel, hf.ViTConfig(**VIT, num_channels=1), {"add_pooling_layer": False}),
}
TEXT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
CLIP_PROMPTS = ("a photo of a cat.", "a dog", "two small ships on a river, by night")
PRESETS = {  # those of research/models/clip.py: text width, layers, heads; vision width, layers, heads, patch, pixels
    "clip-vit-b32": (512, 12, 8, 768, 12, 12, 32, 224),
    "clip-vit-b16": (512, 12, 8, 768, 12, 12, 16, 224),
    "clip-vit-l14": (768, 12, 12, 1024, 24, 16, 14, 224),
    "clip-vit-l14-336": (768, 12, 12, 1024, 24, 16, 14, 336),
}
LENGTHS = (20, 13, 1)

SENTENCES = (
    "The film is a small, quiet triumph of acting and patience.",
    "Two hours of noise.",
    "Nothing in the second half repays the care with which the first one, full of odd and funny people, was written.",
)
PROMPTS = ("The capital of France is", "In 1813, a novel was published: it sold 1,500 copies.\nIts author's name")
# The start of Pride and Prejudice (Jane Austen, 1813; public domain).
AUSTEN = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife.\n\nHowever little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    "this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful "
    "property of some one or other of their daughters."
)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Biases and norms start at 0 and 1, where a swap of two of them would not show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def tiny(name: str) -> None:
    build, config, options = MODELS[name]
    torch.manual_seed(0)
    model = build(config, **options).eval().float()
    randomise(model, 1)
    if name == "t5_1_1":  # transformers 5 ties what T5 1.1 does not, but computes with two tables where it has two
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(model.lm_head.weight.shape))
    tokens = np.random.default_rng(2).integers(3, VOCAB, (len(LENGTHS), max(LENGTHS)))
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32)
    tokens = np.where(mask == 1, tokens, config.pad_token_id or 0).astype(np.int32)
    given = {"input_ids": torch.tensor(tokens, dtype=torch.long), "attention_mask": torch.tensor(mask)}
    if config.is_encoder_decoder:
        targets = np.random.default_rng(3).integers(3, VOCAB, (len(LENGTHS), 7)).astype(np.int32)
        targets[:, 0] = config.decoder_start_token_id
        given["decoder_input_ids"] = torch.tensor(targets, dtype=torch.long)
    out = model(**given, output_hidden_states=True)
    hidden = out.decoder_hidden_states if config.is_encoder_decoder else out.hidden_states
    arrays = {"tokens": tokens, "mask": mask, "hidden": hidden[-1].numpy()}
    if config.is_encoder_decoder:
        arrays["targets"] = targets
    if "logits" in out:
        arrays["logits"] = out.logits.numpy()
    if out.get("pooler_output") is not None:
        arrays["pooled"] = out.pooler_output.numpy()
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "outputs.npz", **arrays)


def draw(rows: int, channels: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(2).normal(size=(rows, channels, 12, 12)).astype(np.float32))


def write(name: str, model: torch.nn.Module, arrays: dict) -> Path:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    np.savez_compressed(folder / "outputs.npz", **{k: np.asarray(v) for k, v in arrays.items()})
    return folder


@torch.no_grad()
def vit(name: str) -> None:
    """A vision transformer; images are kept with channels last."""
    build, config, options = IMAGES[name]
    torch.manual_seed(0)
    model = build(config, **options).eval().float()
    randomise(model, 1)
    images = draw(3, config.num_channels)
    out = model(pixel_values=images, output_hidden_states=True)
    bare = getattr(model, "vit", model)
    arrays = {"images": images.permute(0, 2, 3, 1), "hidden": bare(pixel_values=images).last_hidden_state}
    write(name, model, arrays | ({"logits": out.logits} if "logits" in out else {}))


@torch.no_grad()
def clip(name: str = "clip") -> None:
    """Two towers, with a tokenizer of single letters."""
    byte = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    vocab = {token: i for i, token in enumerate([*byte, *(f"{c}</w>" for c in byte)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    tokenizer = hf.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=40)
    text = TEXT | {"vocab_size": len(vocab), "max_position_embeddings": 40, "eos_token_id": tokenizer.eos_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = hf.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=16)
    torch.manual_seed(0)
    model = hf.CLIPModel(config).eval().float()
    for parameter in model.parameters():  # its own initial values are too small for an error to show
        parameter.data *= 3 if parameter.ndim > 1 else 1
    randomise(model, 1)
    images = draw(2, 3)
    given = tokenizer(list(CLIP_PROMPTS), padding=True, return_tensors="pt")
    out = model(pixel_values=images, **given, return_loss=False)
    arrays = {"tokens": given["input_ids"].int(), "mask": given["attention_mask"].int()}
    arrays |= {"images": images.permute(0, 2, 3, 1), "image_embeds": out.image_embeds, "text_embeds": out.text_embeds}
    arrays |= {"logits": out.logits_per_image, "prompts": CLIP_PROMPTS}
    arrays["pooled_text"], arrays["pooled_image"] = (
        x.pooler_output for x in (model.text_model(**given), model.vision_model(pixel_values=images))
    )
    pairs = model(pixel_values=images, input_ids=given["input_ids"][:2], attention_mask=given["attention_mask"][:2],
                  return_loss=True)  # fmt: skip
    folder = write(name, model, arrays | {"loss": pairs.loss})
    tokenizer.save_pretrained(folder)


def counts() -> None:
    """The parameters of the presets, by shapes alone: the figures in tests/models/test_clip.py."""
    for name, (width, layers, heads, wide, deep, many, patch, size) in PRESETS.items():
        text = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        vision = {"hidden_size": wide, "num_hidden_layers": deep, "num_attention_heads": many, "patch_size": patch}
        text["intermediate_size"], vision["intermediate_size"] = 4 * width, 4 * wide
        config = hf.CLIPConfig(text_config=text, vision_config=vision | {"image_size": size}, projection_dim=width)
        with torch.device("meta"):
            model = hf.CLIPModel(config)
        print(name, sum(p.numel() for p in model.parameters()))


@torch.no_grad()
def minilm(folder: Path) -> None:
    model = hf.BertModel.from_pretrained(folder).eval().float()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    out = model(**batch)
    np.savez_compressed(
        HERE / "minilm.npz",
        tokens=batch["input_ids"].numpy().astype(np.int32),
        mask=batch["attention_mask"].numpy().astype(np.int32),
        hidden=out.last_hidden_state.numpy(),
        pooled=out.pooler_output.numpy(),
    )
    (HERE / "minilm.json").write_text(json.dumps({"sentences": SENTENCES}, indent=1) + "\n")


@torch.no_grad()
def smollm(file: Path) -> None:
    """transformers' own GGUF loader and tokenizer conversion are the reference: no code is shared with the project."""
    model = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    columns = np.linspace(0, model.config.vocab_size - 1, 512).astype(np.int32)
    arrays: dict[str, np.ndarray] = {"columns": columns}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        logits = model(input_ids=ids).logits[0].numpy()
        arrays |= {f"tokens{i}": ids[0].numpy().astype(np.int32), f"logits{i}": logits[:, columns]}
        arrays[f"argmax{i}"] = logits.argmax(-1).astype(np.int32)
    ids = tokenizer(AUSTEN, return_tensors="pt", add_special_tokens=False)["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss
    arrays["austen_tokens"] = ids[0].numpy().astype(np.int32)
    np.savez_compressed(HERE / "smollm2.npz", **arrays)
    figures = {"prompts": PROMPTS, "austen": AUSTEN, "austen_perplexity": round(float(loss.exp()), 4)}
    (HERE / "smollm2.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path, help="directory of the MiniLM files")
    parser.add_argument("--smollm", type=Path, help="the SmolLM2 GGUF file")
    parser.add_argument("--models", nargs="*", help="of the tiny models only these")
    parser.add_argument("--counts", action="store_true", help="also print the counts of CLIP's presets")
    flags = parser.parse_args()
    if flags.counts:
        counts()
    for each in flags.models or (*MODELS, *IMAGES, "clip"):
        (tiny if each in MODELS else vit if each in IMAGES else clip)(each)
    if flags.minilm:
        minilm(flags.minilm)
    if flags.smollm:
        smollm(flags.smollm)
