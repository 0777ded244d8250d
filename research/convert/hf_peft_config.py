"""What all of Hugging Face PEFT's adapter_config.json have in common; each method's own is in `hf_peft_methods.py`.

    {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"k_proj": 4}, ...}
    lora:rank=8,alpha=16,rank_pattern=attn/k:4,targets=attn/(q|k)

An option that has no counterpart is refused, whatever its name, unless it is off or is known to say nothing about a
trained adapter (`SILENT`).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from research.convert import hf_peft_keys as keys
from research.convert.config import Json
from research.errors import ModelError, did_you_mean

SILENT = (
    r"auto_mapping|base_model_name_or_path|revision|inference_mode|peft_(type|version)|task_type|megatron_core|eps|"
    r"(target|exclude)_modules|layers_(to_transform|pattern)|modules_to_save|qalora_group_size|runtime_config|"
    r"eva_config|use_effective_conv2d|token_dim|num_(layers|attention_heads|transformer_submodules)|init_.*|"
    r"prompt_tuning_init.*|tokenizer_.*|encoder_.*|rank_dropout_scale"
)
TASKS = (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")


class Rank(NamedTuple):
    """A module's rows along r and its scale; None where the method has none, or the specification says it."""

    rows: np.ndarray | None = None
    scale: float | None = None


def check(c: Json, known: Iterable[str]) -> list[str]:
    """Refuses what has no counterpart here, and returns notes of what is left out. Raises ModelError.

    known: the options that are understood.
    """
    notes = []
    for option, value in c.items():
        if option in known or re.fullmatch(SILENT, option):
            continue
        if "dropout" in option and value:
            notes.append(f"{option}={value}, which matters in training only, is left out")
        elif value not in (None, False, 0, "", [], {}, "none"):
            raise ModelError(f"its option {option}={json.dumps(value)} has no counterpart here.")
    if other := sorted(set(c.get("modules_to_save") or ()) - {"classifier", "score"}):
        raise ModelError(f"its option modules_to_save={other[0]} has no counterpart here: only a classifier has.")
    if c.get("task_type") not in TASKS:
        raise ModelError(f"its task_type {c['task_type']} has no counterpart here.{did_you_mean('', TASKS[1:])}")
    if c.get("prefix_projection"):
        notes.append("the MLP of prefix_projection is not in the file: the keys and values it gave train themselves")
    return notes


def rank(c: Json, module: str) -> Rank:
    """A module's rank and scale."""

    def own(option: str, default: Any) -> Any:
        return next((x for p, x in c[option].items() if re.match(rf"(.*\.)?({p})$", module)), default)

    kind = c["peft_type"]
    if kind in ("LORA", "LOHA", "HIRA"):
        r, alpha = own("rank_pattern", c["r"]), own("alpha_pattern", c.get("lora_alpha", c.get("alpha")))
        scale = None if kind == "HIRA" else alpha / (r**0.5 if c.get("use_rslora") else r)
        return Rank(np.arange(r), scale)
    if kind == "LOKR":
        return Rank(None, own("alpha_pattern", c["alpha"]) / c["r"])
    if kind == "ADALORA":
        r = c["init_r"]
        kept = (c["rank_pattern"] or {}).get(f"{module}.lora_E", [True] * r)
        if len(kept) != r:
            raise ModelError(f"its rank_pattern has {len(kept)} entries for {module}, and init_r is {r}.")
        return Rank(np.flatnonzero(kept), (c["lora_alpha"] if c["lora_alpha"] > 0 else r) / (r + 1e-5))
    return Rank()


def rank_options(name: str, ranks: dict[tuple[str, int], Rank]) -> Json:
    """Ranks and alphas of sites (and layers) as our options: what holds of most, and patterns for the others."""
    sites: dict[str, Rank] = {}
    for (site, _), one in ranks.items():
        if one.rows is not None and len(one.rows) >= len(sites[site].rows if site in sites else ()):
            sites[site] = one
    if not sites or name == "adalora":
        return {}
    r = {site: len(one.rows) for site, one in sites.items()}
    if name in ("loha", "hira"):
        largest = max(r.values())
        return {"rank": largest} | ({"alpha": next(iter(sites.values())).scale * largest} if name == "loha" else {})
    alpha = {site: one.scale * (r[site] ** 0.5 if name == "rslora" else r[site]) for site, one in sites.items()}
    alpha = {site: float(f"{x:.6g}") for site, x in alpha.items()}
    return most("rank", r, "rank_pattern", _text) | most("alpha", alpha, "alpha_pattern", _text)


def _text(values: dict[str, Any]) -> str:
    """{"layers/attn/q": 6, ...} -> attn/(q|v):6|mlp/up:2."""
    groups = {x: {site for site, y in values.items() if y == x} for x in values.values()}
    return "|".join(f"{keys.pattern(sites, set())}:{number(x)}" for x, sites in groups.items())


def most(name: str, values: dict[str, Any], patterns: str, text: Callable) -> Json:
    """{name: the commonest value, patterns: the others}."""
    common = Counter(values.values()).most_common(1)[0][0]
    rest = {key: x for key, x in values.items() if x != common}
    return {name: common} | ({patterns: text(rest)} if rest else {})


def number(x: Any) -> Any:
    """A whole number without its point."""
    return int(x) if isinstance(x, float) and x == int(x) else x


def spec(name: str, options: Json) -> str:
    """Our specification; an option that is None is left out."""
    given = [f"{key}={number(x)}" for key, x in options.items() if x is not None]
    return f"{name}:{','.join(given)}" if given else name
