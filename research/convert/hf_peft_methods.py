"""Hugging Face PEFT's methods and ours: one entry a peft_type, of what its configuration says, in both directions.

TYPES["HRA"].read({"r": 8, "apply_GS": False}, peek)  ->  "hra", {"rank": 8, "orthogonal": False}
TYPES["HRA"].write({"model.layers.0.self_attn.q_proj": Hra(u)}, {"rank": "8"}, model)  ->  {"r": 8, "apply_GS": False}
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from research.convert import hf_peft_keys as keys
from research.convert.config import Config, Json
from research.convert.hf_peft_config import most, number
from research.errors import ModelError
from research.peft.dora import Dora

Peek = Callable[[str], tuple[int, ...]]  # the end of a tensor's name -> the shape of the first such
Found = dict[str, Any]  # their module -> our node of that layer, host arrays
Given = dict[str, Any]  # the options of our specification: text, or their defaults


class Type(NamedTuple):
    """What one peft_type means.

    options: what it understands of a configuration, with their defaults.
    read: (configuration, peek) -> our method's name and options, but for targets and what `ranks` gives.
    write: (nodes by module, the specification's options, the model's configuration) -> options.
    """

    options: Json
    read: Callable[[Json, Peek], tuple[str, Json]]
    write: Callable[[Found, Given, Config], Json]


def _ranked(found: Found, alpha: str | None, power: float = 1.0) -> Json:
    """r, and alpha, of most modules, and patterns for the others."""
    ranks = {module: keys.rows(node) for module, node in found.items()}
    r = {module: found[module].a.shape[-1] if rows is None else len(rows) for module, rows in ranks.items()}
    out = most("r", r, "rank_pattern", dict)
    if alpha:
        alphas = {module: _alpha(node.scale, r[module] ** power) for module, node in found.items()}
        out |= most(alpha, alphas, "alpha_pattern", dict)
    return out


def _alpha(scale: Any, r: float, tolerance: float = 2e-6) -> float:
    """alpha of a scale that was rounded to fp32: the round number where there is one so near."""
    alpha = float(scale) * r
    near = float(f"{alpha:.5g}")
    return number(near if abs(near - alpha) <= tolerance * abs(near) else alpha)


def _one_scale(found: Found) -> float:
    """The scale that all nodes have. ModelError where they differ."""
    scales = {float(node.scale) for node in found.values()}
    if len(scales) > 1:
        raise ModelError("a scale that differs by layer has no counterpart in Hugging Face PEFT for this method.")
    return scales.pop()


def _true(text: Any) -> bool:
    return str(text).lower() in ("true", "1")


def _first(write: Callable[[Any, Given], Json]) -> Callable[[Found, Given, Config], Json]:
    """What is the same at every module is read from the first."""
    return lambda found, given, config: write(next(iter(found.values())), given)


def _read_lora(c: Json, peek: Peek) -> tuple[str, Json]:
    init = str(c["init_lora_weights"]).lower()
    if init not in ("true", "false", "gaussian", "eva", "orthogonal"):
        raise ModelError(
            f"its option init_lora_weights={init} changes the base's own weights, which the file does not hold: have "
            "it written as plain LoRA (path_initial_model_for_weight_conversion)."
        )
    name = "dora" if c["use_dora"] else "rslora" if c["use_rslora"] else "lora"
    return name, {} if name == "dora" else {"dropout": c["lora_dropout"] or None}


def _write_lora(found: Found, given: Given, config: Config) -> Json:
    rs, node = given["method"] == "rslora", next(iter(found.values()))
    more = {"use_rslora": rs, "use_dora": isinstance(node, Dora), "lora_dropout": getattr(node, "dropout", 0.0)}
    return _ranked(found, "lora_alpha", 0.5 if rs else 1.0) | more


ADALORA = dict(
    rank="target_r", init_rank="init_r", steps="total_step", every="deltaT", orthogonality="orth_reg_weight",
    tinit="tinit", tfinal="tfinal", beta1="beta1", beta2="beta2",
)  # fmt: skip


def _read_adalora(c: Json, peek: Peek) -> tuple[str, Json]:
    options = {"alpha": c["lora_alpha"] if c["lora_alpha"] > 0 else c["init_r"]}
    options |= {ours: c[theirs] for ours, theirs in ADALORA.items()}
    return "adalora", options | {"rank": min(c["target_r"], c["init_r"])}


def _write_adalora(found: Found, given: Given, config: Config) -> Json:
    node, fresh = next(iter(found.values())), not any(np.any(node.lam) for node in found.values())
    r = node.lam.size
    kept = {f"{m}.lora_E": np.isin(np.arange(r), keys.rows(n, fresh)).tolist() for m, n in found.items()}
    c = {theirs: number(float(given[ours])) for ours, theirs in ADALORA.items() if given[ours] is not None}
    c |= {"init_r": r, "lora_alpha": _alpha(_one_scale(found), r + 1e-5, 1e-5)}
    if given["steps"] is None:  # the run's, which an adapter does not know
        c |= {"total_step": 1, "tinit": 0, "tfinal": 0}
    return c | {"rank_pattern": None if all(map(all, kept.values())) else kept}


def _write_lokr(found: Found, given: Given, config: Config) -> Json:
    r = int(given["rank"])
    c = {"r": r, "decompose_both": _true(given["both"]), "decompose_factor": int(given["factor"])}
    return c | most("alpha", {module: _alpha(node.scale, r) for module, node in found.items()}, "alpha_pattern", dict)


def _read_oft(c: Json, peek: Peek) -> tuple[str, Json]:
    size = (1 + round((1 + 8 * peek("oft_R.weight")[-1]) ** 0.5)) // 2  # they round one that does not divide
    terms = c["num_cayley_neumann_terms"] if c["use_cayley_neumann"] else 0
    return "oft", {"block_size": size, "share": c["block_share"], "neumann": terms}


def _write_oft(node: Any, given: Given) -> Json:
    c = {"r": 0, "oft_block_size": node.block_size, "block_share": _true(given["share"])}
    return c | {"use_cayley_neumann": node.neumann > 0, "num_cayley_neumann_terms": node.neumann or 5}


def _read_boft(c: Json, peek: Peek) -> tuple[str, Json]:
    factors, _, size, _ = peek("boft_R")  # without their CUDA kernel there is one factor, whatever was asked for
    return "boft", {"block_size": size, "factors": factors}


def _read_miss(c: Json, peek: Peek) -> tuple[str, Json]:
    form = c["init_weights"] if c["init_weights"] in ("mini", "bat") else "miss"
    columns = c["mini_r"] if form == "mini" else None
    return "miss", {"rank": c["r"], "form": form, "columns": columns, "dropout": c["miss_dropout"] or None}


def _write_miss(node: Any, given: Given) -> Json:
    more = {"init_weights": True if given["form"] == "miss" else given["form"]}
    more |= {"mini_r": node.m.shape[1]} if given["form"] == "mini" else {}
    return {"r": node.m.shape[-2], "miss_dropout": getattr(node, "dropout", 0.0)} | more


def _write_hira(found: Found, given: Given, config: Config) -> Json:
    if _one_scale(found) != 1:
        raise ModelError("hira with a scale other than 1 has no counterpart in Hugging Face PEFT.")
    return _ranked(found, None)


def _write_tokens(found: Found, given: Given, config: Config) -> Json:
    """Virtual tokens, or keys and values, and the sizes of the model that they fit."""
    node, heads, width = next(iter(found.values())), config.num_heads, config.hidden_size
    if prefix := not hasattr(node, "table"):
        _, heads, size = node.k.shape
        width = heads * size
    c = {"num_virtual_tokens": (node.k if prefix else node.table).shape[0], "token_dim": width}
    return c | {"num_layers": config.num_layers, "num_attention_heads": heads, "num_transformer_submodules": 1}


def _read_ptuning(c: Json, peek: Peek) -> tuple[str, Json]:
    options = {"length": c["num_virtual_tokens"], "encoder": str(c["encoder_reparameterization_type"]).lower()}
    return "ptuning", options | {"hidden": c["encoder_hidden_size"] or c.get("token_dim")}


def _write_ptuning(found: Found, given: Given, config: Config) -> Json:
    c = {"encoder_reparameterization_type": given["encoder"].upper(), "encoder_num_layers": 2}
    return _write_tokens(found, given, config) | c | {"encoder_hidden_size": int(given["hidden"] or config.hidden_size)}


def _write_adaption(found: Found, given: Given, config: Config) -> Json:
    if config.family not in ("llama", "mistral") or set(found) != set(dict(keys.attentions(config, len(found)))):
        raise ModelError(
            "llama_adapter has a counterpart in Hugging Face PEFT for the top layers of LLaMA and Mistral."
        )
    length = next(iter(found.values())).prompt.shape[0]
    return {"adapter_len": length, "adapter_layers": len(found), "target_modules": "self_attn"}


_RANKS: Json = dict(r=8, rank_pattern={}, alpha_pattern={})
TYPES: dict[str, Type] = {
    "LORA": Type(
        _RANKS
        | dict(lora_alpha=8, lora_dropout=0.0, use_rslora=False, use_dora=False, init_lora_weights=True),
        _read_lora, _write_lora,
    ),
    "ADALORA": Type(
        dict(r=8, init_r=12, target_r=8, lora_alpha=8, rank_pattern=None, total_step=1, tinit=0, tfinal=0, deltaT=1,
             beta1=0.85, beta2=0.85, orth_reg_weight=0.5),
        _read_adalora, _write_adalora,
    ),
    "IA3": Type(dict(feedforward_modules=[]), lambda c, peek: ("ia3", {}), lambda *_: {}),
    "VERA": Type(
        dict(r=256, projection_prng_key=0, save_projection=True, d_initial=0.1),
        lambda c, peek: ("vera", dict(rank=c["r"], d_init=c["d_initial"], seed=c["projection_prng_key"])),
        _first(lambda node, given: dict(r=node.d.size, projection_prng_key=int(given["seed"]), save_projection=True)),
    ),
    "LOHA": Type(_RANKS | dict(alpha=8), lambda c, peek: ("loha", {}), lambda found, *_: _ranked(found, "alpha")),
    "LOKR": Type(
        dict(r=8, alpha=8, alpha_pattern={}, decompose_both=False, decompose_factor=-1),
        lambda c, peek: ("lokr", dict(rank=c["r"], alpha=c["alpha"], factor=c["decompose_factor"],
                                      both=c["decompose_both"])),
        _write_lokr,
    ),
    "OFT": Type(
        dict(r=0, oft_block_size=32, block_share=False, use_cayley_neumann=True, num_cayley_neumann_terms=5),
        _read_oft, _first(_write_oft),
    ),
    "BOFT": Type(
        dict(boft_block_size=4, boft_block_num=0, boft_n_butterfly_factor=1),
        _read_boft,
        _first(lambda node, given: dict(
            boft_block_size=node.r.shape[-1], boft_block_num=0, boft_n_butterfly_factor=node.r.shape[0]
        )),
    ),
    "HRA": Type(
        dict(r=8, apply_GS=False),
        lambda c, peek: ("hra", dict(rank=c["r"], orthogonal=c["apply_GS"])),
        _first(lambda node, given: dict(r=node.u.shape[-1], apply_GS=node.orthogonal)),
    ),
    "FOURIERFT": Type(
        dict(n_frequency=1000, scaling=150.0, random_loc_seed=777),
        lambda c, peek: ("fourierft", dict(frequencies=c["n_frequency"], scale=c["scaling"],
                                            seed=c["random_loc_seed"])),
        lambda found, given, config: dict(n_frequency=next(iter(found.values())).spectrum.size,
                                          scaling=number(_one_scale(found)), random_loc_seed=int(given["seed"])),
    ),
    "MISS": Type(dict(r=64, mini_r=1, init_weights=True, miss_dropout=0.0), _read_miss, _first(_write_miss)),
    "SHIRA": Type(
        dict(r=32, mask_type="random", random_seed=None),
        lambda c, peek: ("shira", dict(rank=c["r"])),
        _first(lambda node, given: dict(r=int(given["rank"]))),
    ),
    "HIRA": Type(_RANKS | dict(r=32), lambda c, peek: ("hira", {}), _write_hira),
    "LN_TUNING": Type({}, lambda c, peek: ("layernorm", {}), lambda *_: {}),
    "PROMPT_TUNING": Type(
        dict(num_virtual_tokens=None), lambda c, peek: ("prompt", dict(length=c["num_virtual_tokens"])), _write_tokens
    ),
    "P_TUNING": Type(
        dict(num_virtual_tokens=None, encoder_reparameterization_type="MLP", encoder_hidden_size=None),
        _read_ptuning, _write_ptuning,
    ),
    "PREFIX_TUNING": Type(
        dict(num_virtual_tokens=None, prefix_projection=False),
        lambda c, peek: ("prefix", dict(length=c["num_virtual_tokens"], hidden=0)), _write_tokens,
    ),
    "ADAPTION_PROMPT": Type(
        dict(adapter_len=None, adapter_layers=None),
        lambda c, peek: ("llama_adapter", dict(length=c["adapter_len"])), _write_adaption,
    ),
}  # fmt: skip
