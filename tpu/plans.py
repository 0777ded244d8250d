"""Compiles the plans of docs/plans.md, one after the other, and writes that page.

    python -m tpu.plans                      # a minute a plan on two cores; what is there with the same versions stays
    python -m tpu.plans --only=70b           # those whose line has this in it

Differs from `tpu.plan`, which compiles one and prints all of it.
"""

import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import flags

from experiments.shared import common
from research.files import write_text
from tpu import chips, plan
from tpu.steps import Job

# Flags of `tpu.plan`, as one would type them.
PLANS = [
    "--model=llama3-8b --topology=v5e:4x4 --mesh=fsdp:16 --batch=16",
    "--model=llama3-8b --topology=v5e:4x4 --mesh=fsdp:16 --batch=16 --chunk=4096",
    "--model=llama3-8b --topology=v5p:2x2x1 --mesh=fsdp:4 --batch=16",
    "--model=llama3-70b --topology=v5p:4x4x4 --mesh=fsdp:64 --batch=64",
    "--model=llama3-70b --topology=v5p:4x4x4 --mesh=fsdp:16,tensor:4 --batch=64",
    "--model=llama3-70b --topology=v5e:16x16 --mesh=fsdp:256 --batch=256",
    "--task=grpo --model=llama3-8b --topology=v5e:4x4 --mesh=fsdp:16 --batch=64 --seq=1024 --chunk=4096",
    "--task=dit --model=dit-xl2 --topology=v5e:4x4 --mesh=data:16 --batch=256",
    "--task=dit --model=dit-xl2 --peft=full --topology=v5e:4x4 --mesh=fsdp:16 --batch=256",
]
HEADS = ("step", "slice and mesh", "batch", "base", "trains", "optimiser", "activations", "of HBM", "FLOPs", "links",
         "at best", "limit")  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "plans.md"


def define_flags() -> None:
    flags.DEFINE_string("only", "", "Compile the plans whose line has this in it; the others' rows stay.")
    flags.DEFINE_string("output", str(PAGE), "The page.")


def main() -> None:
    chips.compile_only()
    page = Path(flags.FLAGS.output)
    rows = kept(page)
    for line in PLANS:
        if flags.FLAGS.only in line:
            print(line, flush=True)
            rows[line] = row(line)
            write_text(page, text(rows))
    print(f"written: {page}")


def row(line: str) -> list[str]:
    """The cells of a plan that is compiled now."""
    given = dict(item.removeprefix("--").split("=", 1) for item in shlex.split(line))
    mesh, numbers = given.pop("mesh"), ("batch", "seq", "chunk")
    job = Job(**{"peft": "lora:rank=16", "seq": 2048} | {k: int(v) if k in numbers else v for k, v in given.items()})
    return cells(job, plan.plan(job, mesh))


def cells(job: Job, p: dict[str, Any]) -> list[str]:
    """A plan in the columns of HEADS; sizes in GiB a chip."""
    gib = {name: f"{size / plan.GIB:.2f}" for name, size in p["memory"].items()}
    total = sum(p["memory"].values())
    size = f"{job.batch} images" if p["unit"] == "images" else f"{job.batch} x {job.seq}"
    head = [f"{job.task}, {job.model}, `{job.peft}`", f"{job.topology} `{p['mesh']}`", size, *gib.values()]
    share = f"{total / plan.GIB:.1f} of {p['hbm'] / plan.GIB:.0f}: {'fits' if p['fits'] else '**too large**'}"
    if not p["seconds"]:
        return [*head, *[""] * (len(HEADS) - 5 - len(head)), share, f"{p['flops']:.2e}", "", "", ""]
    links = sum(c["nbytes"] for c in p["collectives"].values()) / plan.GIB
    rate = f"{1000 * p['roofline']:.0f} ms, {p['units'] / p['roofline']:,.0f} {p['unit']}/s"
    return [*head, share, f"{p['flops']:.2e}", f"{links:.1f} GiB", rate, p["limit"]]


def kept(page: Path) -> dict[str, list[str]]:
    """The rows of an earlier call with the same versions, by their line of flags."""
    if not page.exists() or versions() not in page.read_text(encoding="utf-8"):
        return {}
    lines = [x.strip("| \n").split(" | ") for x in page.read_text(encoding="utf-8").splitlines() if x.startswith("| ")]
    known = [x for x in lines if len(x) == len(HEADS) + 1]
    return {x[-1].strip("`"): x[:-1] for x in known if x[-1].strip("`") in PLANS}


def versions() -> str:
    return f"jax {version('jax')}, libtpu {version('libtpu')}"


def text(rows: dict[str, list[str]]) -> str:
    """The page."""
    table = [[*HEADS, "flags of `tpu.plan`"], ["---"] * (len(HEADS) + 1)]
    table += [[*rows[line], f"`{line}`"] for line in PLANS if line in rows]
    return INTRODUCTION.format(versions=versions()) + "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"


INTRODUCTION = """# Plans for slices that nobody here has

Written by `python -m tpu.plans` ({versions}).

Each row is the project's own training step, compiled by the slice's own compiler, with `lora:rank=16` and 2,048
tokens a row unless it says otherwise; bfloat16, everything in a layer computed again in the backward pass. Sizes are
GiB a chip, as the compiler reserves them; `links` is what a chip sends in a step. FLOPs are those of the program
before it is shared out, divided by the chips. The time is the largest of what products, HBM and links need alone at
the chip's published peaks. HBM traffic is an estimate that can be too high: XLA counts a loop's body once, and all of
its bytes are scaled by what it misses of the FLOPs, also those outside loops. So where the limit is HBM the time is
no bound, and plans that differ in loops (`--chunk`) can't be compared by it.

"""


if __name__ == "__main__":
    define_flags()
    common.run(main)
