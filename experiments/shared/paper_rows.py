"""The figures that `experiments.params --paper` checks: where each is printed, and what it counts.

`exact` is what the arithmetic gives and what the project must count; `printed` is the figure as its source has it, the
exact one where none prints it (table "arithmetic"). `gap` says why the two differ. A model is a preset, changed by what
follows it ("pooler", "no pooler", a head of "2 classes"), or one of `SITES`, of which only projections are known.
"""

from typing import NamedTuple

import jax

from research.nn.sites import Site


class Row(NamedTuple):
    paper: str
    table: str
    model: str
    spec: str
    exact: int
    printed: str = ""
    gap: str = ""
    total: bool = False  # counts all parameters, and not those that train


def _attention(width: int, layers: int) -> dict[str, Site]:
    """Query, key, value and output projections of a stack."""
    stack = jax.ShapeDtypeStruct((layers,), "float32")
    return {f"layers/attn/{x}": Site("linear", (width, width), ("embed", "heads"), stack) for x in "qkvo"}


SITES = {"deberta-v2-xxlarge": _attention(1536, 48)}
LATER = ()  # families whose rows wait for their presets

BERT, ROBERTA, MINILM = "BERT, 1810.04805", "RoBERTa, 1907.11692", "MiniLM, 2002.10957"
LORA, HOULSBY, BITFIT = "LoRA, 2106.09685", "Houlsby, 1902.00751", "BitFit, 2106.10199"
PREFIX, PROMPT, T_FEW = "Prefix, 2101.00190", "Prompt, 2104.08691", "T-Few, 2205.05638"
PTUNING, PTUNING_V2, IA3 = "P-tuning, 2103.10385", "P-tuning v2, 2110.07602", "(IA)3, 2205.05638"
PFEIFFER, SMOLLM2, HF = "Pfeiffer, 2005.00247", "SmolLM2, 2502.02737", "HF PEFT 0.21.2"
SUM, RUN, OTHER = "arithmetic", "run", "another's run"
CUT = "cut off, not rounded"
MEBI = "fits where M is 2^20"

BACKBONES = [
    Row(BERT, "text", "bert-base", "full", 109_482_240, "110M"),
    Row(BERT, OTHER, "bert-base, 2 classes", "full", 109_483_778),
    Row(BERT, SUM, "bert-base-cased", "full", 108_310_272),
    Row(HOULSBY, "text", "bert-large", "full", 335_141_888, "330M", "to two digits it is 340M"),
    Row(BERT, SUM, "bert-large-cased", "full", 333_579_264),
    Row(BITFIT, OTHER, "bert-tiny, 2 classes", "bitfit", 4_386_178, total=True),
    Row(LORA, "2", "roberta-base", "full", 124_055_040, "125.0M", "with pooler and head it is 124.6M"),
    Row(ROBERTA, OTHER, "roberta-base, pooler", "full", 124_645_632),
    Row(ROBERTA, SUM, "roberta-base, pooler, 2 classes", "full", 124_647_170),
    Row(LORA, "2", "roberta-large", "full", 354_310_144, "355.0M", "with a classification head it is 355.4M"),
    Row(ROBERTA, SUM, "roberta-large, pooler, 2 classes", "full", 355_361_794),
    Row(MINILM, "-", "minilm-l6", "full", 22_713_216, "22M", CUT),
    Row(MINILM, SUM, "minilm-l6, no pooler", "full", 22_565_376),
    Row(SMOLLM2, "name", "smollm2-135m", "full", 134_515_008, "135M"),
    Row(HF, RUN, "smollm2-135m", "full", 134_515_008),
]

METHODS = [
    Row(LORA, "2", "roberta-base", "lora:rank=8", 294_912, "0.3M"),
    Row(LORA, "2", "roberta-large", "lora:rank=8", 786_432, "0.8M"),
    Row(LORA, "2", "deberta-v2-xxlarge", "lora:rank=16,alpha=32", 4_718_592, "4.7M"),
    Row(
        LORA,
        "2 and 10",
        "deberta-v2-xxlarge",
        "lora:rank=8,alpha=8",
        2_359_296,
        "4.7M",
        "table 10 says r = 8, the authors' scripts 16",
    ),
    Row(LORA, "2, BitFit", "roberta-base", "bitfit", 102_144, "0.1M"),
    Row(LORA, "2, AdptP", "roberta-large", "pfeiffer:width=64", 3_171_840, "3.0M", MEBI),
    Row(LORA, "2, AdptP", "roberta-large", "pfeiffer:width=16", 811_392, "0.8M"),
    Row(LORA, "2, AdptH", "roberta-large", "houlsby:width=64,norms=false", 6_343_680, "6.0M", MEBI),
    Row(LORA, "2, AdptH", "roberta-large", "houlsby:width=8,norms=false", 835_968, "0.8M"),
    Row(LORA, "2, AdptD (m inferred)", "roberta-base", "pfeiffer:width=48", 894_528, "0.9M"),
    Row(LORA, "2, AdptD (m, layers inferred)", "roberta-base", "pfeiffer:width=48,layers=8-11", 298_176, "0.3M"),
    Row(LORA, SUM, "minilm-l6", "lora:rank=8", 73_728),
    Row(BITFIT, SUM, "bert-base", "bitfit", 102_912),
    Row(BITFIT, OTHER, "bert-base, 2 classes", "bitfit", 104_450),
    Row(BITFIT, SUM, "bert-large", "bitfit", 272_384),
    Row(BITFIT, SUM, "bert-tiny", "bitfit", 3_072),
    Row(BITFIT, OTHER, "bert-tiny, 2 classes", "bitfit", 3_330),
    Row(BITFIT, SUM, "bert-base", "bitfit:targets=attn/q|mlp/up", 46_080),
    Row(BITFIT, OTHER, "bert-base, 2 classes", "bitfit:targets=attn/q|mlp/up", 47_618),
    Row(BITFIT, SUM, "bert-base, 2 classes", "bitfit:targets=attn/q|mlp/up|pooler", 48_386),
    Row(BITFIT, SUM, "minilm-l6", "bitfit", 26_112),
    Row(BITFIT, SUM, "smollm2-135m", "bitfit", 0),
    Row(HOULSBY, "text", "bert-base", "layernorm", 38_400, "40K"),
    Row(
        HOULSBY, "1", "bert-large", "houlsby:width=64", 6_444_032, "2.1%", "2.1 % of the encoder without its embeddings"
    ),
    Row(HOULSBY, "1", "bert-large", "houlsby:width=64", 6_444_032, "1.2x"),
    Row(HOULSBY, SUM, "bert-large", "houlsby:width=8", 936_320),
    Row(HOULSBY, SUM, "bert-large", "houlsby:width=256", 25_327_616),
    Row(HOULSBY, "text", "bert-base", "houlsby:width=64", 2_417_664, "2M"),
    Row(HOULSBY, SUM, "bert-base", "houlsby:width=8", 351_936),
    Row(HOULSBY, SUM, "minilm-l6", "houlsby:width=16,norms=false", 152_256),
    Row(PFEIFFER, SUM, "minilm-l6", "pfeiffer:width=16", 76_128),
    Row(IA3, SUM, "minilm-l6", "ia3", 13_824),
    Row(PTUNING, SUM, "bert-base", "ptuning:length=9", 8_278_272),
    Row(PTUNING, SUM, "bert-large", "ptuning:length=9", 14_707_712),
    *(Row(PTUNING_V2, SUM, "roberta-large", f"ptuning_v2:length={p}", p * 49_152) for p in (8, 128)),
    *(Row(PTUNING_V2, SUM, "bert-large", f"ptuning_v2:length={p}", p * 49_152) for p in (16, 20, 40)),
    Row(PTUNING_V2, SUM, "minilm-l6", "ptuning_v2:length=20", 92_160),
    Row(PROMPT, SUM, "minilm-l6", "prompt:length=20", 7_680),
    Row(PREFIX, SUM, "smollm2-135m", "prefix:length=10,hidden=0", 115_200),
    Row("UniPELT, 2110.07577", OTHER, "roberta-base, pooler", "unipelt", 11_083_376),
]

# What HF PEFT itself counts on SmolLM2's shapes, beside the options that mean the same here.
NARROW = "HF's table and MLP are as wide as a layer's keys, the paper's as the model"
HF_PEFT = [
    Row(HF, RUN, "smollm2-135m", spec, exact)
    for spec, exact in {
        "lora": 460_800,
        "lora:targets=all": 2_442_240,
        "lora:rank=16,targets=all": 4_884_480,
        "rslora": 460_800,
        "dora": 483_840,
        "dora:targets=all": 2_597_760,
        "adalora:init_rank=12": 691_920,
        "ia3": 57_600,
        "vera:rank=256": 38_400,
        "oft:block_size=32": 535_680,
        "oft:block_size=32,targets=all": 2_321_280,
        "boft:block_size=4": 161_280,
        "fourierft:frequencies=1000": 60_000,
        "layernorm": 35_136,
        "loha:rank=8": 921_600,
        "lokr:rank=8": 47_040,
        "hra:rank=8": 276_480,
        "miss:rank=64": 1_474_560,
        "shira:rank=32": 1_843_200,
        "hira:rank=32": 1_843_200,
        "llama_adapter:length=10": 172_830,
        "prompt:length=20": 11_520,
        "ptuning:length=20,encoder=mlp": 1_008_576,
        "ptuning:length=20,encoder=mlp,hidden=128": 176_192,
        "ptuning:length=20,encoder=lstm,hidden=576": 15_293_376,
        "prefix:length=20,hidden=0": 230_400,
        "trainable_tokens:rows=1|2": 1_152,
    }.items()
] + [
    Row(HF, RUN, "smollm2-135m", "prefix:length=20,hidden=192", 2_345_664, "2,264,256", NARROW),
    Row(HF, RUN, "smollm2-135m", "prefix:length=20,hidden=512", 6_216_704, "6,012,416", NARROW),
]

OWN_NORMS = "the adapters' own norms are {:,} more"
GPT2 = [
    Row("GPT-2", SUM, "gpt2", "full", 124_439_808),
    Row(LORA, "3", "gpt2-medium", "full", 354_823_168, "354.92M", "looks like a misprint of 354.82M"),
    Row(LORA, "3", "gpt2-large", "full", 774_030_080, "774.03M"),
    Row("GPT-2", SUM, "gpt2-xl", "full", 1_557_611_200),
    Row(LORA, "3", "gpt2-medium", "lora:rank=4", 393_216, "0.35M", "0.35M is 0.1 % of the model"),
    Row(LORA, "3", "gpt2-large", "lora:rank=4", 737_280, "0.77M", "0.77M is 0.1 % of the model"),
    *(
        Row(LORA, "3, AdapterL (m inferred)", model, f"pfeiffer:width={m}", exact, printed, OWN_NORMS.format(norms))
        for model, m, exact, printed, norms in (
            ("gpt2-medium", 6, 319_632, "0.37M", 49_152), ("gpt2-medium", 224, 11_040_000, "11.09M", 49_152),
            ("gpt2-large", 8, 783_648, "0.88M", 92_160), ("gpt2-large", 248, 22_910_688, "23.00M", 92_160),
        )
    ),
    Row(LORA, "3, AdapterH", "gpt2-medium", "houlsby:width=112,norms=false", 11_064_576, "11.09M", "no m gives it"),
    Row(LORA, "3, FTTop2", "gpt2-medium", "full:layers=22-23", 25_192_448, "25.19M"),
    Row(PREFIX, SUM, "gpt2-medium", "prefix:length=5,hidden=0", 245_760),
    Row(PREFIX, SUM, "gpt2-medium", "prefix:length=10,hidden=0", 491_520),
    Row(PREFIX, SUM, "gpt2-medium", "prefix:length=5", 25_744_896),
    Row(PREFIX, SUM, "gpt2-medium", "prefix:length=10", 25_750_016),
]  # fmt: skip

PRE_LAYER_GAP = "the formula of section 5.1 gives less than is printed"
PRE_LAYER = {(2, 2): "5.1M", (8, 0): "10.1M", (8, 8): "20.2M", (32, 4): "44.1M", (64, 0): "76.1M"}
GPT3 = [
    Row(LORA, "4", "gpt3", "full", 174_604_259_328, "175,255.8M", "175,221.8M with an untied head"),
    Row(LORA, "15", "gpt3", "lora:rank=1", 4_718_592, "4.7M"),
    Row(LORA, "15", "gpt3", "lora:rank=2,targets=attn/v", 4_718_592, "4.7M"),
    Row(LORA, "15", "gpt3", "lora:rank=2", 9_437_184, "9.4M"),
    Row(LORA, "15", "gpt3", "lora:rank=4", 18_874_368, "18.8M", CUT),
    Row(LORA, "15", "gpt3", "lora:rank=8", 37_748_736, "37.7M"),
    Row(LORA, "15", "gpt3", "lora:rank=64", 301_989_888, "301.9M", CUT),
    Row(LORA, "15", "gpt3", "lora:rank=64,targets=attn/(q|k|v|o)", 603_979_776, "603.8M", "0.2M less is printed"),
    Row(LORA, "15, LoRA+PE", "gpt3", "lora:rank=8+prompt:length=8", 37_847_040, "37.8M"),
    Row(LORA, "15, LoRA+PE", "gpt3", "lora:rank=32+prompt:length=8", 151_093_248, "151.1M"),
    Row(LORA, "15, LoRA+PE", "gpt3", "lora:rank=64+prompt:length=8", 302_088_192, "302.1M"),
    Row(LORA, "15, LoRA+PL", "gpt3", "lora:rank=8+vpt:length=12,deep=true", 51_904_512, "52.8M", PRE_LAYER_GAP),
    *(
        Row(LORA, "15, AdapterH", "gpt3", f"houlsby:width={m},norms=false", 192 * (24_577 * m + 12_288), printed)
        for m, printed in {1: "7.1M", 4: "21.2M", 8: "40.1M", 16: "77.9M", 64: "304.4M"}.items()
    ),
    Row(LORA, "15, PreEmbed", "gpt3", "prompt:length=40", 491_520, "0.4M", CUT),
    *(
        Row(LORA, "15, PreEmbed", "gpt3", f"prompt:length={p}", 12_288 * p, printed)
        for p, printed in {72: "0.9M", 136: "1.7M", 264: "3.2M", 520: "6.4M"}.items()
    ),
    *(
        Row(LORA, "15, PreLayer", "gpt3", f"vpt:length={sum(p)},deep=true", 96 * 12_288 * sum(p), printed,
            PRE_LAYER_GAP)
        for p, printed in PRE_LAYER.items()
    ),
    Row(LORA, "4, BitFit", "gpt3", "bitfit", 12_988_416, "14.2M", "a layer has 11 d biases; 12 d would fit"),
]  # fmt: skip

# Size -> width, parameters.
T5_SIZES = {
    "small": (512, 76_961_152), "base": (768, 247_577_856), "large": (1024, 783_150_080),
    "xl": (2048, 2_849_757_184), "xxl": (4096, 11_135_332_352),
}  # fmt: skip
BOTH = "T-Few has as many tokens before the decoder's sequence"
SWAPPED = "a misprint: the same table's other rows follow the formula"
MISPRINTS = {("small", 20): ("10,420", "76,971,572"), ("xxl", 50): ("", "11,137,380,352")}
T5 = [
    *(Row("T5.1.1", SUM, f"t5.1.1-{size}", "full", count) for size, (_, count) in T5_SIZES.items()),
    *(
        Row(PROMPT, "4", f"t5.1.1-{size}", f"prompt:length={p}", exact, printed, printed and SWAPPED, total)
        for size, (d, count) in T5_SIZES.items()
        for p in (1, 5, 20, 50, 100, 150)
        for exact, printed, total in zip(
            (p * d, count + p * d), MISPRINTS.get((size, p), ("", "")), (False, True), strict=True
        )
    ),
    Row(PROMPT, "4", "t5.1.1-large", "prompt:length=100", 102_400, "0.01907%", "a misprint of 0.01307 %"),
    *(
        Row(IA3, SUM, f"t5.1.1-{size}", "ia3", exact)
        for size, exact in {"small": 34_816, "base": 104_448, "large": 282_624}.items()
    ),
    Row(T_FEW, "4", "t5.1.1-xl", "ia3", 540_672, "540K"),
    Row(T_FEW, "text", "t5.1.1-xxl", "ia3", 1_081_344, "0.01%"),
    Row(T_FEW, "4", "t5.1.1-xl", "layernorm", 249_856, "250K"),
    Row(T_FEW, "4", "t5.1.1-xl", "bitfit+layernorm", 0, "1.3M", "T5 has no biases; T-Few gives it 1,081,344"),
    Row(T_FEW, "4", "t5.1.1-xl", "lora:rank=4,targets=all+layernorm", 9_097_216, "9.1M"),
    Row(T_FEW, "4", "t5.1.1-xl", "houlsby:width=64,targets=mlp_residual", 12_934_144, "12.9M"),
    Row(T_FEW, "4", "t5.1.1-xl", "prompt:length=10", 20_480, "41K", BOTH),
    Row(T_FEW, "4", "t5.1.1-xl", "prompt:length=100", 204_800, "409K", BOTH),
]

DIT_COUNTS = {
    "s": (32_865_056, 32_920_448, 33_142_016, "33M"), "b": (130_315_808, 130_426_496, 130_869_248, "130M"),
    "l": (457_840_672, 457_988_224, 458_578_432, "458M"), "xl": (674_834_720, 675_000_704, 675_664_640, "675M"),
}  # fmt: skip
VIT_COUNTS = {
    "ti16": (5_524_416, 5_717_416), "s16": (21_665_664, 22_050_664), "b16": (85_798_656, 86_567_656),
    "l16": (303_301_632, 304_326_632), "h14": (630_764_800, 632_045_800),
}  # fmt: skip
VISION = [
    *(Row("DiT, 2212.09748", "1", f"dit-{size}2", "full", c[0], c[3]) for size, c in DIT_COUNTS.items()),
    *(
        Row("DiT, 2212.09748", SUM, f"dit-{size}{patch}", "full", c[i])
        for size, c in DIT_COUNTS.items()
        for i, patch in ((1, 4), (2, 8))
    ),
    *(
        Row("ViT, 2010.11929", SUM, f"vit-{size}{head}", "full", exact)
        for size, counts in VIT_COUNTS.items()
        for head, exact in zip(("", ", 1000 classes"), counts, strict=True)
    ),
    Row("VPT, 2203.12119", SUM, "vit-b16", "vpt:length=50,deep=false", 38_400),
    *(Row("VPT, 2203.12119", SUM, "vit-b16", f"vpt:length={p},deep=true", 9_216 * p) for p in (1, 5, 10, 50, 100, 200)),
]

ROWS = [*BACKBONES, *METHODS, *HF_PEFT, *GPT2, *GPT3, *T5, *VISION]
