"""Counts of a program: FLOPs from its jaxpr, collectives from its compiled HLO, each times how often a loop runs it.

XLA's own cost analysis counts the body of a loop once, whatever its length: for a scan over 80 layers 80 times too
small.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_BYTES |= {"s64": 8, "u64": 8, "s4": 1, "u4": 1, "f8e4m3fn": 1, "f8e5m2": 1}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """`count` executions a step; `nbytes` that each chip sends over links for all of them, on rings of its group."""

    count: int
    nbytes: int


def matmul_flops(jaxpr: Any, repeat: int = 1) -> int:
    """Multiplications and additions of all matrix products and convolutions that the program runs, on all chips.

    A scan's body counts as often as it runs, a branch as its dearest, a while loop's body once (no training step has
    one). Work that XLA removes is counted still, what rematerialisation repeats is counted again.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, times = eqn.primitive.name, repeat
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2 * repeat * math.prod(eqn.outvars[0].aval.shape) * summed
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            total += (
                2 * repeat * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            )
        elif name == "scan":
            times = repeat * eqn.params["length"]
        inner = [matmul_flops(j, times) for j in _inner(eqn.params)]
        total += max(inner, default=0) if name == "cond" else sum(inner)
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation; rules for derivatives are functions, no programs, so they don't count."""
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"):
            yield getattr(leaf, "jaxpr", leaf)


def collectives(hlo: str) -> dict[str, Collective]:
    """By kind, of one step on one chip. `hlo`: `compiled.as_text()`.

    An asynchronous pair counts at its start. With n chips in a group and b bytes of the larger of operand and result, a
    chip sends b (n - 1) / n, in an all-reduce twice that, in a permutation b.
    """
    bodies, entry = _computations(hlo)
    repeats: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        repeats[name] += times
        for line in bodies.get(name, ()):
            for kind, callee in re.findall(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
                visit(callee, times * (_trips(line, bodies) if kind == "body" else 1))
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for callee in branches.split(","):
                    visit(callee.strip().lstrip("%"), times)

    visit(entry, 1)
    found: dict[str, Collective] = {}
    seen: set[str] = set()
    for name, times in repeats.items():
        sizes = {line.split(" = ")[0].split()[-1].lstrip("%"): line for line in bodies[name]}
        for line in bodies[name]:
            match = re.search(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(([^)]*)\)", line)
            if not match:
                continue
            shape, kind, operands = match.groups()
            channel = re.search(r"channel_id=\d+", line)
            if channel and channel.group() in seen:  # the parts of one that runs beside other work share its channel
                continue
            seen.update([channel.group()] if channel else [])
            operand = sum(_nbytes(sizes[o].split(" = ")[1].split("(")[0]) for o in _names(operands) if o in sizes)
            size, n = max(operand, _nbytes(shape) - (operand if "-start(" in line else 0)), _group(line)
            factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
            old = found.get(kind, Collective(0, 0))
            found[kind] = Collective(old.count + times, old.nbytes + round(times * size * factor))
    return found


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = head.group(2)
            entry = current if head.group(1) else entry
            bodies[current] = []
        elif " = " in line and current:
            bodies[current].append(line)
    return bodies, entry


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a while loop runs: what XLA notes, else the bound that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known.group(1))
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    lines = bodies.get(condition.group(1), []) if condition else []
    return max((int(n) for text in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)), default=1)


def _names(operands: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", operands) or [part.split()[-1] for part in operands.split(",") if part.strip()]


def _nbytes(shape: str) -> int:
    """Bytes of "bf16[8,128]{1,0:T(8,128)}" or of a tuple of such."""
    arrays = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape)
    return sum(_BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays)


def _group(line: str) -> int:
    """Chips in a group of the collective; 2 where the line names none (a permutation has pairs)."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh.group(2)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    return int(iota.group(2)) if iota else 2
