"""Which rows a table of methods has, where each row's files lie, and whether all of it can be done: asked before the
first row trains.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.shared import common
from experiments.shared.classification import check, check_length
from experiments.shared.table import COLUMNS
from experiments.shared.training import saved_identity
from research.convert.load import Pretrained
from research.errors import FlagError
from research.peft import registry

# Method: (specification, peak learning rate). The rates are starting points; --tune tries their neighbours. A method
# that is not here has its defaults and RATE.
ROWS = {
    "full": ("full", 1e-4),
    "linear_probe": ("linear_probe", 3e-2),
    "bitfit": ("bitfit", 5e-3),
    "layernorm": ("layernorm", 5e-3),
    "last_layers": ("last_layers:count=2", 3e-4),
    "fishmask": ("fishmask", 1e-3),
    "lt_sft": ("lt_sft", 1e-3),
    "far": ("far", 3e-4),
    "prompt": ("prompt:length=20", 3e-2),
    "spot": ("spot:length=20", 3e-2),
    "ipt": ("ipt:length=20", 3e-2),
    "ptuning": ("ptuning", 3e-3),
    "prefix": ("prefix:length=10,hidden=128", 3e-3),
    "ptuning_v2": ("ptuning_v2:length=10", 1e-2),
    "llama_adapter": ("llama_adapter", 1e-2),
    "ia3": ("ia3", 2e-2),
    "lora": ("lora:rank=8", 2e-3),
    "rslora": ("rslora:rank=8", 1e-3),
    "lora_plus": ("lora_plus:rank=8", 5e-4),
    "lora_fa": ("lora_fa:rank=8", 5e-3),
    "eva": ("eva:rank=8", 2e-3),
    "dora": ("dora:rank=8", 2e-3),
    "adalora": ("adalora:rank=8", 5e-3),
    "vera": ("vera", 2e-2),
    "loha": ("loha", 5e-3),
    "lokr": ("lokr", 5e-3),
    "krona": ("krona", 5e-3),
    "hira": ("hira", 1e-2),
    "fourierft": ("fourierft", 5e-2),
    "said": ("said", 2e-2),
    "oft": ("oft", 3e-3),
    "boft": ("boft", 3e-3),
    "hra": ("hra", 3e-3),
    "pfeiffer": ("pfeiffer:width=64", 1e-3),
    "houlsby": ("houlsby:width=64", 1e-3),
    "compacter": ("compacter", 5e-3),
    "compacterpp": ("compacterpp", 5e-3),
    "ladder": ("ladder", 2e-3),
    "attention_fusion": ("attention_fusion", 1e-2),
}
RATE = 1e-3
NINE = "full,linear_probe,bitfit,prompt,ptuning_v2,ia3,lora,pfeiffer,houlsby"


@dataclass(frozen=True)
class Entry:
    """One row to fill."""

    name: str
    spec: str
    rate: float

    @property
    def folder(self) -> str:
        """A file name that no other entry has: what a file name can't hold is replaced, and a hash tells it apart."""
        plain = re.sub(r"[^\w.=+-]+", "_", self.name)[:80]
        return plain if plain == self.name else f"{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def parse(methods: str, small: bool = False) -> list[Entry]:
    """The entries of --methods: names of rows or specifications, each with an optional @rate, or "all" the methods that
    there are, with `small` by options that fit a tiny model. Raises FlagError.
    """
    if methods.strip() == "all":
        rows = {name: ROWS.get(name, (name, RATE)) for name in sorted(registry.names(), key=_place)}
        return [Entry(name, registry.small(name) if small else spec, rate) for name, (spec, rate) in rows.items()]
    found = []
    for item in re.split(";" if re.search("[;:]", methods) else ",", methods):
        name, at, text = (part.strip() for part in item.partition("@"))
        spec, rate = ROWS.get(name, (name, RATE))
        registry.parse(spec)
        try:
            rate = float(text) if at else rate
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise FlagError(f"--methods: {text!r} is no learning rate. Valid: {name}@1e-3.")
        found.append(Entry(name, spec, rate))
    if len({e.name for e in found}) < len(found):
        raise FlagError("--methods names a method twice.")
    return found


def _place(name: str) -> int:
    """Those of ROWS in its order, then the others."""
    return list(ROWS).index(name) if name in ROWS else len(ROWS)


def applicable(entries: Sequence[Entry], base: Pretrained, max_length: int, skip: bool) -> list[Entry]:
    """The entries whose method has something to train on the model; with `skip` the others are left out with a line.

    Raises FlagError without `skip`, where none is left, and where rows and virtual tokens outgrow the model.
    """
    kept, reason = [], None
    for entry in entries:
        try:
            added = check(base, entry.spec)
        except FlagError as error:
            if not skip:
                raise
            reason = error
            print(f"{entry.name} is left out: {error}")
            continue
        check_length(base, added, max_length)
        kept.append(entry)
    if not kept:
        raise FlagError(f"no method is left: {reason}")
    return kept


def read_result(path: Path) -> dict[str, Any]:
    """A finished row's {"identity", "row"}. Raises DataError where the file is damaged."""
    found = common.read_json(path, identity=dict, row=dict)
    common.check_keys(found["row"], COLUMNS, path)
    return found


def finished(where: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result in an entry's folder, if it is there. FlagError where a result or a checkpoint is of other settings:
    nothing that was computed is ever deleted for another run.
    """
    what = f"{where.parent.name}/{where.name} in {where.parents[1]} holds a"
    if (where / "result.json").exists():
        found = read_result(where / "result.json")
        common.refuse_other(found["identity"], identity, f"{what} result")
        return found
    common.refuse_other(saved_identity(where / "checkpoints") or identity, identity, f"{what} run begun")
    return None
