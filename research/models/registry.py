"""Presets and modules by name."""

import flax.linen as nn

from research.errors import ModelError, did_you_mean
from research.models import bert, dit, llama, unet, vit
from research.nn.layers import REMAT

Config = bert.BertConfig | llama.LlamaConfig | dit.DitConfig | unet.UnetConfig | vit.VitConfig

PRESETS: dict[str, Config] = bert.PRESETS | llama.PRESETS | dit.PRESETS | unet.PRESETS | vit.PRESETS

_MODULES: dict[type, type[nn.Module]] = {
    bert.BertConfig: bert.Bert,
    llama.LlamaConfig: llama.Llama,
    dit.DitConfig: dit.Dit,
    unet.UnetConfig: unet.Unet,
    vit.VitConfig: vit.Vit,
}


def preset(name: str) -> Config:
    """The configuration of a full-size model; ModelError names the nearest one."""
    if name not in PRESETS:
        raise ModelError(f"unknown model preset {name!r}.{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def build(config: Config) -> nn.Module:
    """The module of a configuration. ModelError for a remat policy that there is not."""
    if config.remat not in REMAT:
        raise ModelError(f"unknown remat policy {config.remat!r}.{did_you_mean(config.remat, REMAT)}")
    return _MODULES[type(config)](config)
