"""Presets and modules by name."""

import flax.linen as nn

from research.errors import ModelError, did_you_mean
from research.models import bert, bloom, clip, dit, gemma, gpt2, llama, t5, unet, vit
from research.nn import kernels
from research.nn.layers import REMAT

FAMILIES = {
    bert: (bert.BertConfig, bert.Bert),
    bloom: (bloom.BloomConfig, bloom.Bloom),
    clip: (clip.ClipConfig, clip.Clip),
    dit: (dit.DitConfig, dit.Dit),
    gemma: (gemma.GemmaConfig, gemma.Gemma),
    gpt2: (gpt2.Gpt2Config, gpt2.Gpt2),
    llama: (llama.LlamaConfig, llama.Llama),
    t5: (t5.T5Config, t5.T5),
    unet: (unet.UnetConfig, unet.Unet),
    vit: (vit.VitConfig, vit.Vit),
}
Config = (
    bert.BertConfig
    | bloom.BloomConfig
    | clip.ClipConfig
    | dit.DitConfig
    | gemma.GemmaConfig
    | gpt2.Gpt2Config
    | llama.LlamaConfig
    | t5.T5Config
    | unet.UnetConfig
    | vit.VitConfig
)
PRESETS: dict[str, Config] = {name: config for family in FAMILIES for name, config in family.PRESETS.items()}
_MODULES: dict[type, type[nn.Module]] = dict(FAMILIES.values())


def preset(name: str) -> Config:
    """The configuration of a full-size model; ModelError names the nearest one."""
    if name not in PRESETS:
        raise ModelError(f"unknown model preset {name!r}.{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def build(config: Config) -> nn.Module:
    """The module of a configuration. ModelError for a remat policy, FlagError for an attention that there is not."""
    if config.remat not in REMAT:
        raise ModelError(f"unknown remat policy {config.remat!r}.{did_you_mean(config.remat, REMAT)}")
    kernels.check(getattr(config, "kernel", "xla"))
    return _MODULES[type(config)](config)
