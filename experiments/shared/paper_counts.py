"""`experiments.params --paper`: every checked figure of the papers beside what the project's own methods count.

    | LoRA, 2106.09685 | 2 | roberta-base | lora:rank=8 | 294,912 | 0.3M | rounds to |

A verdict is `equal` (all digits are printed), `rounds to` (the digits that are printed are those of the count, rounded;
zeros that end a whole number are no digits: 110M has two), `known gap` with its reason, `pending` where the family has
no preset yet, or `FAILS`. A count comes from `peft.init` and `peft.mask` on shapes; that it is the arithmetic's is
checked in each row, those of a gap too.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

import jax

from experiments.shared.paper_rows import LATER, ROWS, SITES, Row
from research.errors import FlagError, UserError
from research.models.registry import PRESETS, build, preset
from research.peft import method as peft
from research.peft import registry, tree
from research.tasks import classify

UNITS = {"": 1, "K": 10**3, "M": 10**6, "%": 1, "x": 1}
TASKS = 9  # that share one base in Houlsby's table 1, where "1.2x" is the size of all in bases


def table(rows: Sequence[Row] = ROWS) -> None:
    """Prints a line for each row, and one that sums them up. Raises UserError where a figure is another."""
    known = [("paper", "table", "model", "method", "computed", "printed", "verdict")]
    known += [(r.paper, r.table, _model(r), _spec(r), "", _printed(r)) for r in rows]
    widths = [max(len(cells[i]) for cells in known) for i in range(4)] + [15, max(len(cells[5]) for cells in known)]
    print(line(known[0], widths), line(["---"] * 7, widths), sep="\n")
    found: Counter = Counter()
    for row in rows:
        computed, verdict = judge(row)
        found[verdict.partition(":")[0]] += 1
        print(
            line((row.paper, row.table, _model(row), _spec(row), computed, _printed(row), verdict), widths), flush=True
        )
    waiting = [family for family in LATER if any(pending(r) and r.model.startswith(family) for r in rows)]
    told = [f"{count} {verdict}" for verdict, count in found.items() if verdict != "pending"]
    told += [f"{found['pending']} pending ({', '.join(waiting)})"] if waiting else []
    print(f"\n{len(rows)} figures: {', '.join(told)}")
    if found["FAILS"]:
        raise UserError(f"{found['FAILS']} of {len(rows)} figures are not what the project counts.")


def line(cells: Iterable[str], widths: Iterable[int] = ()) -> str:
    """A line of a Markdown table."""
    padded = [cell.replace("|", "\\|").ljust(width) for cell, width in zip(cells, [*widths, *[0] * 9], strict=False)]
    return "| " + " | ".join(padded) + " |"


def judge(row: Row) -> tuple[str, str]:
    """(what is counted, the verdict)."""
    if pending(row):
        return "", "pending"
    printed = _printed(row)
    try:
        trained, total, base = count(row.model, row.spec)
    except FlagError as error:
        if row.exact:
            return "", f"FAILS: {error}"
        trained = total = base = 0  # nothing to train is refused
    found = total if row.total else trained
    value, unit, shown = Fraction(found), re.sub(r"[\d.,]", "", printed), f"{found:,}"
    if unit in ("%", "x"):
        value = Fraction(100 * found, base) if unit == "%" else 1 + Fraction(TASKS * found, base)
        shown += f" = {float(value):.3g}{unit}"
    if found != row.exact:
        return shown, f"FAILS: the arithmetic gives {row.exact:,}"
    holds = rounds_to(printed, value)
    if row.gap:
        return shown, "FAILS: there is no gap" if holds else f"known gap: {row.gap}"
    whole = printed.replace(",", "").isdigit()
    return shown, ("equal" if whole else "rounds to") if holds else "FAILS: another figure is printed"


def pending(row: Row) -> bool:
    """Whether the row waits for its family."""
    name = row.model.partition(",")[0]
    return name not in PRESETS and name.startswith(LATER)


def rounds_to(printed: str, value: Fraction) -> bool:
    """Whether `value`, rounded to the digits of "0.3M", "102,912" or "2.1%", is that."""
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", printed.replace(",", "")).groups()
    whole, _, decimals = number.partition(".")
    step = Fraction(1, 10 ** len(decimals))
    if unit and not decimals:
        step = Fraction(10 ** (len(whole) - len(whole.rstrip("0"))))
    return math.floor(value / UNITS[unit] / step + Fraction(1, 2)) * step == Fraction(number)


def count(model: str, spec: str) -> tuple[int, int, int]:
    """(what trains, all parameters, the base's), a head's in the first two."""
    variables, sites = shapes(model)
    method = registry.parse(spec)
    variables = variables | {"peft": jax.eval_shape(lambda: peft.init(method, jax.random.key(0), sites))}
    total = peft.parameters(variables) + tree.count(variables.get("head", {}))
    return tree.count(variables, peft.mask(method, variables)), total, tree.count(variables["params"])


@functools.cache
def shapes(model: str) -> tuple[dict, dict]:
    """The abstract base and head, and the sites: of a preset, or sites alone."""
    name, *changes = model.split(", ")
    if name in SITES:
        return {"params": {}}, SITES[name]
    config = preset(name)
    if pooler := [change for change in changes if change.endswith("pooler")]:
        config = dataclasses.replace(config, pooler=pooler == ["pooler"])
    if config.family == "vit":  # its preset has the paper's head; the rows say when they count one
        config = dataclasses.replace(config, num_classes=0)
    module = build(config)
    variables = {"params": peft.base(module)[0]}
    for change in set(changes) - set(pooler):
        classes = int(change.removesuffix(" classes"))
        head = functools.partial(classify.init_head, features=config.hidden_size, classes=classes)
        variables["head"] = jax.eval_shape(head, jax.random.key(0))
    return variables, peft.sites(module)


def _model(row: Row) -> str:
    return f"{row.model} (sites)" if row.model in SITES else row.model


def _spec(row: Row) -> str:
    return f"{row.spec} (total)" if row.total else row.spec


def _printed(row: Row) -> str:
    return row.printed or f"{row.exact:,}"
