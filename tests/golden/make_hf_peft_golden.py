"""Writes the adapter directories of Hugging Face PEFT, and the outputs they give, that tests/convert/test_hf_peft.py
compares with.

Run with an environment that has torch, transformers and peft (made with torch 2.13, transformers 5.24, peft 0.21.2):

    python tests/golden/make_hf_peft_golden.py                                      # writes tests/golden/hf_peft
    python tests/golden/make_hf_peft_golden.py --check DIR     # what the project wrote, read by Hugging Face PEFT

DIR holds one adapter directory a case, of the cases' names; each must give the golden outputs.
"""

import argparse
import json
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import torch
import transformers as hf

HERE = Path(__file__).parent / "hf_peft"
LLAMA, BERT = HERE / "base", Path(__file__).parent / "bert"
# name -> class, weights, task, real tokens of the two rows
BASES = {
    "llama": (hf.LlamaForCausalLM, LLAMA, "CAUSAL_LM", (8, 8)),
    "llama_cls": (hf.LlamaForSequenceClassification, LLAMA, "SEQ_CLS", (8, 8)),
    "bert": (hf.BertModel, BERT, "FEATURE_EXTRACTION", (8, 5)),
    "bert_cls": (hf.BertForSequenceClassification, BERT, "SEQ_CLS", (8, 5)),
}
VOCAB, LAYERS = 32, 2
QV, QKD = ["q_proj", "v_proj"], ["q_proj", "k_proj", "down_proj"]
ATTN = "model.layers.{}.self_attn.{}"
# AdaLoRA's masks as its allocator leaves them: one module keeps everything, one keeps nothing.
KEPT = {
    (0, "q_proj"): [1, 0, 1, 0],
    (0, "v_proj"): [1, 1, 1, 1],
    (1, "q_proj"): [0, 0, 0, 0],
    (1, "v_proj"): [0, 1, 0, 0],
}


class Case(NamedTuple):
    """One adapter: its configuration, and how far its parameters are moved from their start."""

    config: type
    options: dict
    std: float = 0.2
    base: str = "llama"


def lora(**options) -> Case:
    return Case(peft.LoraConfig, {"r": 4, "lora_alpha": 12, "target_modules": QV} | options)


CASES = {
    "lora": lora(lora_dropout=0.1),
    "lora_all": lora(target_modules="all-linear", r=2)._replace(std=0.1),
    "lora_regex": lora(target_modules=r".*\.1\.(self_attn\.o|mlp\.up)_proj"),
    "lora_layers": lora(layers_to_transform=[1], init_lora_weights="gaussian"),
    "lora_patterns": lora(
        target_modules=QKD,
        rank_pattern={"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        alpha_pattern={"down_proj": 5},
    ),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "lora_uneven": lora(target_modules=r".*\.(0\.self_attn\.o|1\.self_attn\.(o|k)|0\.mlp\.down)_proj"),
    "lora_bert": lora(target_modules=["query", "dense"])._replace(base="bert_cls"),
    "adalora": Case(
        peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "lora_alpha": 12, "target_modules": QV, "total_step": 9}
    ),
    "adalora_pruned": Case(
        peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "lora_alpha": 12, "target_modules": QV, "total_step": 9}
    ),
    "ia3": Case(peft.IA3Config, {}),
    "vera": Case(peft.VeraConfig, {"r": 6, "target_modules": QKD, "projection_prng_key": 3}),
    "vera_unsaved": Case(peft.VeraConfig, {"r": 6, "target_modules": QV, "save_projection": False}),
    "loha": Case(peft.LoHaConfig, {"r": 3, "alpha": 6, "target_modules": QV}),
    "lokr": Case(peft.LoKrConfig, {"r": 2, "alpha": 4, "target_modules": QV}),
    "lokr_both": Case(
        peft.LoKrConfig,
        {"r": 1, "alpha": 2, "target_modules": QKD, "decompose_both": True, "decompose_factor": 4},
    ),
    "oft": Case(peft.OFTConfig, {"oft_block_size": 8, "target_modules": QV}, 0.1),
    "oft_cayley": Case(
        peft.OFTConfig, {"r": 2, "oft_block_size": 0, "target_modules": QV, "use_cayley_neumann": False}
    ),
    "oft_shared": Case(peft.OFTConfig, {"oft_block_size": 4, "target_modules": QV, "block_share": True}, 0.1),
    "boft": Case(peft.BOFTConfig, {"boft_block_size": 8, "target_modules": QKD}),
    "hra": Case(peft.HRAConfig, {"r": 4, "target_modules": QV}),
    "hra_gs": Case(peft.HRAConfig, {"r": 3, "target_modules": QV, "apply_GS": True}),
    "fourierft": Case(
        peft.FourierFTConfig, {"n_frequency": 40, "target_modules": QV, "random_loc_seed": 778, "scaling": 20.0}
    ),
    "miss": Case(peft.MissConfig, {"r": 8, "target_modules": QKD}, 0.1),
    "miss_bat": Case(peft.MissConfig, {"r": 8, "target_modules": QV, "init_weights": "bat"}, 0.1),
    "miss_mini": Case(peft.MissConfig, {"r": 8, "mini_r": 4, "target_modules": QV, "init_weights": "mini"}, 0.1),
    "shira": Case(peft.ShiraConfig, {"r": 2, "target_modules": QV, "random_seed": 5}),
    "hira": Case(peft.HiraConfig, {"r": 4, "target_modules": QV}),
    "ln_tuning": Case(peft.LNTuningConfig, {}),
    "prompt": Case(peft.PromptTuningConfig, {"num_virtual_tokens": 5}),
    "prefix": Case(peft.PrefixTuningConfig, {"num_virtual_tokens": 3}),
    "prefix_mlp": Case(
        peft.PrefixTuningConfig, {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 12}, 0.1
    ),
    "ptuning": Case(peft.PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 12}, 0.2),
    "ptuning_lstm": Case(
        peft.PromptEncoderConfig,
        {"num_virtual_tokens": 4, "encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
        0.3,
    ),
    "prompt_bert": Case(peft.PromptTuningConfig, {"num_virtual_tokens": 3}, base="bert"),
    "prompt_head": Case(peft.PromptTuningConfig, {"num_virtual_tokens": 3}, base="llama_cls"),
    "prefix_bert": Case(peft.PrefixTuningConfig, {"num_virtual_tokens": 3}, base="bert"),
    "llama_adapter": Case(peft.AdaptionPromptConfig, {"adapter_len": 4, "adapter_layers": 1}),
}


def make_base() -> None:
    """The tiny Llama."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = hf.LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at 1, where a swap of two of them would not show
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(LLAMA)
    (LLAMA / "generation_config.json").unlink(missing_ok=True)


def read_base(name: str) -> hf.PreTrainedModel:
    build, folder, task, _ = BASES[name]
    torch.manual_seed(3)  # of a head
    model = build.from_pretrained(folder, **({"num_labels": 3} if task == "SEQ_CLS" else {}))
    model.config._name_or_path = model.name_or_path = ""  # no path of this machine in a file
    model.config.pad_token_id = 0
    return model.eval().float()


def batch(base: str) -> dict[str, torch.Tensor]:
    tokens = np.random.default_rng(2).integers(3, VOCAB, (2, 8))
    mask = (np.arange(8) < np.array(BASES[base][3])[:, None]).astype(np.int64)
    return {"input_ids": torch.tensor(tokens * mask), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def outputs(model: torch.nn.Module, base: str) -> np.ndarray:
    """Logits, or hidden states, of the text's tokens (a soft prompt's come before them); a classifier's logits."""
    out = model(**batch(base))
    values = out.last_hidden_state if base == "bert" else out.logits
    return values[:, -8:].numpy() if values.ndim == 3 else values.numpy()


@torch.no_grad()
def make(name: str, case: Case) -> np.ndarray:
    torch.manual_seed(4)
    config = case.config(task_type=BASES[case.base][2], **case.options)
    model = peft.get_peft_model(read_base(case.base), config).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += case.std * torch.randn(parameter.shape, generator=generator)
    if name == "adalora_pruned":
        pattern = {f"{ATTN.format(*key)}.lora_E.default": [bool(x) for x in kept] for key, kept in KEPT.items()}
        model.peft_config["default"].rank_pattern = pattern
        for key, kept in KEPT.items():
            module = model.base_model.model.get_submodule(ATTN.format(*key))
            module.lora_E["default"].data *= torch.tensor(kept)[:, None]
    made = outputs(model, case.base)
    folder = HERE / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = "tiny"
    for key, value in config.items():  # sets, in whatever order they came
        if isinstance(value, list) and all(isinstance(x, str) for x in value):
            config[key] = sorted(value)
    file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    reloaded = read(folder, case)
    assert np.abs(made - reloaded).max() < 1e-5, (name, np.abs(made - reloaded).max())
    return reloaded


@torch.no_grad()
def read(folder: Path, case: Case) -> np.ndarray:
    """The outputs of an adapter directory as Hugging Face PEFT reads it: a key it doesn't find is an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*Unexpected keyword arguments.*")
        model = peft.PeftModel.from_pretrained(read_base(case.base), folder).eval()
    return outputs(model, case.base)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", type=Path)
    parser.add_argument("names", nargs="*", default=list(CASES))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    hf.utils.logging.disable_progress_bar()
    if args.check:
        wanted = dict(np.load(HERE / "outputs.npz"))
        for folder in sorted(p for p in args.check.iterdir() if p.is_dir()):
            error = np.abs(read(folder, CASES[folder.name]) - wanted[folder.name]).max()
            print(f"{folder.name:16} {error:.1e} {'ok' if error < 1e-5 else 'DIFFERENT'}")
        return
    shutil.rmtree(HERE, ignore_errors=True)
    make_base()
    arrays = {}
    for base in BASES:
        arrays |= {f"{base}/{key}": value.numpy().astype(np.int32) for key, value in batch(base).items()}
        arrays[base] = outputs(read_base(base), base)
    for name in args.names:
        arrays[name] = make(name, CASES[name])
        print(f"{name:16} moves {CASES[name].base} by {np.abs(arrays[name] - arrays[CASES[name].base]).max():.2f}")
    np.savez_compressed(HERE / "outputs.npz", **arrays)


if __name__ == "__main__":
    main()
