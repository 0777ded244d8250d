"""Exact parameter counts, from shapes alone."""

import dataclasses
import functools

import jax
import pytest

from research.models.bert import BertConfig
from research.models.registry import build, preset
from research.peft import method as peft
from research.peft import registry, tree

SHAPES = {
    "bert-large-cased": dataclasses.replace(preset("bert-large"), vocab_size=28996),
    "roberta-base-pooler": dataclasses.replace(preset("roberta-base"), pooler=True),
    "minilm-l6-nopooler": dataclasses.replace(preset("minilm-l6"), pooler=False),
    # Whose attention (and, for adapters, whose width) is GPT-3's, DeBERTa-XXL's, GPT-2's: all that the counts see.
    "gpt3": BertConfig(hidden_size=12288, num_layers=96, num_heads=96, intermediate_size=49152),
    "deberta-xxl": BertConfig(hidden_size=1536, num_layers=48, num_heads=24, intermediate_size=6144),
    "gpt2-medium": BertConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
}


@functools.cache
def shapes(name: str):
    model = build(SHAPES[name] if name in SHAPES else preset(name))
    return peft.base(model)[0], peft.sites(model)


def count(name: str, spec: str) -> int:
    """Trained elements of the method without a task's head."""
    base, sites = shapes(name)
    method = registry.parse(spec)
    variables = {"params": base, "peft": jax.eval_shape(lambda: peft.init(method, jax.random.key(0), sites))}
    return tree.count(variables, peft.mask(method, variables))


BACKBONES = [
    ("bert-tiny", 4_385_920),
    ("bert-base", 109_482_240),
    ("bert-base-cased", 108_310_272),
    ("bert-large", 335_141_888),
    ("bert-large-cased", 333_579_264),
    ("roberta-base", 124_055_040),
    ("roberta-base-pooler", 124_645_632),
    ("roberta-large", 354_310_144),
    ("minilm-l6", 22_713_216),
    ("minilm-l6-nopooler", 22_565_376),
    ("smollm2-135m", 134_515_008),
    ("smollm2-360m", 361_821_120),
    ("smollm2-1.7b", 1_711_376_384),
    ("llama-7b", 6_738_415_616),
    ("llama2-7b", 6_738_415_616),
    ("llama2-13b", 13_015_864_320),
    ("llama2-70b", 68_976_648_192),
    ("llama3-8b", 8_030_261_248),
    ("llama3-70b", 70_553_706_496),
    ("llama3.1-8b", 8_030_261_248),
    ("llama3.1-70b", 70_553_706_496),
    ("llama3.1-405b", 405_853_388_800),
    ("llama3.2-1b", 1_235_814_400),
    ("llama3.2-3b", 3_212_749_824),
    ("mistral-7b", 7_241_732_096),
    ("qwen2-0.5b", 494_032_768),
    ("qwen2-7b", 7_615_616_512),
    ("qwen3-0.6b", 596_049_920),
    ("qwen3-8b", 8_190_735_360),
]


@pytest.mark.parametrize(("name", "total"), BACKBONES)
def test_backbones(name, total):
    base, _ = shapes(name)
    assert tree.count(base) == total
    assert count(name, "full") == total


ROWS = [
    # BitFit: 12 * (7 * 768 + 3072) + 2 * 768 with a pooler; the paper's two-bias form; LayerNorm (Houlsby's "40k")
    ("bert-tiny", "bitfit", 3_072),
    ("bert-base", "bitfit", 102_912),
    ("bert-large", "bitfit", 272_384),
    ("roberta-base", "bitfit", 102_144),
    ("minilm-l6", "bitfit", 26_112),
    ("bert-base", "bitfit:targets=attn/q|mlp/up", 46_080),
    ("bert-base", "bitfit:targets=attn/q|mlp/up|pooler", 46_848),
    ("bert-base", "layernorm", 38_400),
    ("smollm2-135m", "layernorm", 35_136),
    # LoRA, tables 2, 3, 4 and 15: 0.3M, 0.8M, 4.7M, 37.7M (37.75), 301.9M (301.99)
    ("roberta-base", "lora:rank=8", 294_912),
    ("roberta-large", "lora:rank=8", 786_432),
    ("deberta-xxl", "lora:rank=16", 4_718_592),
    ("gpt2-medium", "lora:rank=4", 393_216),
    ("gpt3", "lora:rank=1", 4_718_592),
    ("gpt3", "lora:rank=2,targets=attn/v", 4_718_592),
    ("gpt3", "lora:rank=2", 9_437_184),
    ("gpt3", "lora:rank=4", 18_874_368),
    ("gpt3", "lora:rank=8", 37_748_736),
    ("gpt3", "lora:rank=64", 301_989_888),
    ("gpt3", "lora:rank=64,targets=attn/(q|k|v|o)", 603_979_776),
    ("minilm-l6", "lora:rank=8", 73_728),
    ("smollm2-135m", "lora:rank=8", 460_800),
    ("smollm2-135m", "lora:rank=8,targets=all", 2_442_240),
    # LoRA's adapter baselines: AdptP, AdptH and AdptD of table 2, AdapterH of table 15
    ("roberta-base", "pfeiffer:width=48", 894_528),
    ("roberta-large", "pfeiffer:width=64", 3_171_840),
    ("roberta-large", "pfeiffer:width=16", 811_392),
    ("roberta-large", "houlsby:width=64,norms=false", 6_343_680),
    ("roberta-large", "houlsby:width=8,norms=false", 835_968),
    ("gpt3", "houlsby:width=1,norms=false", 7_078_080),
    ("gpt3", "houlsby:width=4,norms=false", 21_234_432),
    ("gpt3", "houlsby:width=8,norms=false", 40_109_568),
    ("gpt3", "houlsby:width=16,norms=false", 77_859_840),
    ("gpt3", "houlsby:width=64,norms=false", 304_361_472),
    # Adapters
    ("bert-base", "houlsby", 2_417_664),
    ("bert-base", "houlsby:width=8", 351_936),
    ("bert-large", "houlsby:width=8", 936_320),
    ("bert-large", "houlsby:width=64", 6_444_032),
    ("bert-large", "houlsby:width=256", 25_327_616),
    ("minilm-l6", "houlsby:width=16,norms=false", 152_256),
    ("minilm-l6", "pfeiffer:width=16", 76_128),
    # (IA)3: 6 * (384 * 2 + 1536); 30 * (192 * 2 + 1536)
    ("minilm-l6", "ia3", 13_824),
    ("smollm2-135m", "ia3", 57_600),
    # Prefixes: stored, and while the MLP trains; P-tuning v2
    ("gpt2-medium", "prefix:length=5,hidden=0", 245_760),
    ("gpt2-medium", "prefix:length=10,hidden=0", 491_520),
    ("gpt2-medium", "prefix:length=5", 25_744_896),
    ("gpt2-medium", "prefix:length=10", 25_750_016),
    ("smollm2-135m", "prefix:length=10,hidden=0", 115_200),
    ("roberta-large", "ptuning_v2:length=8", 393_216),
    ("roberta-large", "ptuning_v2:length=16", 786_432),
    ("bert-large", "ptuning_v2:length=20", 983_040),
    ("bert-large", "ptuning_v2:length=40", 1_966_080),
    ("bert-large", "ptuning_v2:length=128", 6_291_456),
    ("minilm-l6", "ptuning_v2:length=20", 92_160),
    # Prompts: P * D
    ("minilm-l6", "prompt:length=20", 7_680),
    ("smollm2-135m", "prompt:length=20", 11_520),
    ("bert-base", "prompt:length=100", 76_800),
    ("llama3-8b", "prompt:length=1", 4_096),
    # Chains add up
    ("bert-base", "bitfit:targets=attn/q+layernorm", 12 * 768 + 25 * 2 * 768),
    ("roberta-base", "lora+ia3", 294_912 + 12 * (2 * 768 + 3072)),
    ("smollm2-135m", "lora+lora:rank=4", 460_800 * 3 // 2),
    # The largest, which no memory would hold: 80 * 8 * ((8192 + 8192) + (8192 + 1024))
    ("llama3-70b", "lora:rank=8", 16_384_000),
]


@pytest.mark.parametrize(("name", "spec", "trained"), ROWS)
def test_methods(name, spec, trained):
    assert count(name, spec) == trained


def test_defaults_are_the_papers():
    """What no option names: rank 8 on query and value, m = 64, 20 virtual tokens."""
    assert count("roberta-base", "lora") == 294_912
    assert count("roberta-base", "pfeiffer") == 12 * (2 * 768 * 64 + 64 + 768)
    assert count("minilm-l6", "prompt") == 7_680 and count("minilm-l6", "ptuning_v2") == 92_160
    assert count("smollm2-135m", "prefix:hidden=0") == 115_200


def test_heads_train_and_count_apart():
    base, sites = shapes("bert-base")
    head = {"kernel": jax.ShapeDtypeStruct((768, 2), "float32"), "bias": jax.ShapeDtypeStruct((2,), "float32")}
    for spec, trained in (("bitfit", 104_450), ("linear_probe", 1_538), ("full", 109_483_778)):
        variables = {"params": base, "peft": {}, "head": head}
        assert tree.count(variables, peft.mask(registry.parse(spec), variables)) == trained
    assert tree.count(base) == 109_482_240


def test_totals_include_what_was_added():
    base, sites = shapes("smollm2-135m")
    added = jax.eval_shape(lambda: peft.init(registry.parse("lora"), jax.random.key(0), sites))
    scales = 2 * 30
    assert tree.count({"params": base, "peft": added}) == 134_515_008 + 460_800 + scales
