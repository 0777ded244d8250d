"""Compiles the project's own training step for TPUs that nobody has, and tells memory, traffic and the time at best.

    python -m tpu.plan --model=llama3-8b --peft=lora:rank=16 --topology=v5e:4x4 --mesh=fsdp:16 --batch=16 --seq=2048

libtpu's compiler runs on any CPU (extra `tpu`); weights are shapes only. Memory is what the compiler reserves. The
time is a roofline: the largest of what products, HBM traffic (an estimate, too high where much lies outside loops)
and links need alone, at the chip's published peaks. `--suggest` compiles several meshes and micro-batches, best
first. Limits: the planner knows nothing of the host, of data loading, or of the network between slices.
"""

import dataclasses
import itertools
import json
from typing import Any

import jax
from absl import flags
from tabulate import tabulate

from experiments.shared import common
from research.errors import FlagError
from research.nn.layers import REMAT
from research.peft import method as peft
from research.peft import registry, tree
from research.train import count, optimizer, state
from research.train import mesh as meshes
from research.train.step import compile as compile_step
from research.train.step import make_step
from tpu import chips
from tpu.steps import TASKS, Job, parts

GIB = 2**30
FITS = 0.98  # of the chip's HBM: the runtime keeps some for itself


def define_flags() -> None:
    flags.DEFINE_enum("task", "lm", list(TASKS), "What the step learns.")
    flags.DEFINE_string("model", "llama3-8b", "Preset of a decoder; of a DiT for --task=dit.")
    flags.DEFINE_string("peft", "lora:rank=16", "Method specification.")
    flags.DEFINE_string("topology", "v5e:4x4", "Chip and shape of the slice, as in v5p:4x4x4.")
    flags.DEFINE_string("mesh", "", "Axes and sizes, as in data:2,fsdp:8 (axes: data, fsdp, tensor, sequence).")
    flags.DEFINE_integer("batch", 16, "Rows a step, on all chips together.", lower_bound=1)
    flags.DEFINE_integer("seq", 2048, "Tokens a row.", lower_bound=2)
    flags.DEFINE_integer("micro_batches", 1, "Parts a batch is computed in, one after the other.", lower_bound=1)
    flags.DEFINE_enum("remat", "full", sorted(REMAT), "What the backward pass recomputes.")
    flags.DEFINE_enum("attention", "xla", ["xla", "splash"], "Its implementation.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Compute dtype.")
    flags.DEFINE_enum("base_dtype", "bfloat16", ["bfloat16", "float32"], "How the base is stored.")
    flags.DEFINE_string("optimizer", "adamw", "optax optimiser by name.")
    flags.DEFINE_integer("chunk", 0, "Tokens whose logits exist at a time, on all chips; 0 for all.", lower_bound=0)
    flags.DEFINE_bool("suggest", False, "Compile several meshes and micro-batches instead, best first.")
    flags.DEFINE_integer("most", 6, "How many plans --suggest compiles.", lower_bound=1)
    flags.DEFINE_bool("json", False, "Print JSON.")


def main() -> None:
    chips.compile_only()
    values = flags.FLAGS
    job = Job(**common.flag_values(*(field.name for field in dataclasses.fields(Job))))
    plans = suggest(job, values.most) if values.suggest else [plan(job, values.mesh, values.micro_batches)]
    print(json.dumps(common.finite(plans), indent=1) if values.json else "\n\n".join(map(table, plans)))


def program(job: Job, spec: str, micro: int) -> tuple[Any, tuple, tuple, jax.sharding.Mesh]:
    """The step, its abstract arguments and their shardings (state, frozen, batch), and the mesh."""
    mesh = meshes.make_mesh(spec or f"fsdp:{len(chips.devices(job.topology))}", chips.devices(job.topology))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if job.batch % (ways * micro):
        near = max(1, round(job.batch / (ways * micro))) * ways * micro
        raise FlagError(
            f"batch={job.batch} is not divided by data x fsdp x micro_batches = {ways} x {micro}. Valid: {near}."
        )
    made = parts(job, micro)
    model, loss = made.model, made.loss
    method, sites, tx = registry.parse(job.peft), peft.sites(model), optimizer.make(job.optimizer, 1e-4)
    params, axes = peft.base(model)
    added = jax.eval_shape(lambda: peft.init(method, jax.random.key(0), sites))
    variables = {"params": params, "peft": added} | made.state
    axes = {"params": axes, "peft": peft.init_axes(method, sites)}
    axes |= {name: jax.tree.map(lambda _: None, leaves) for name, leaves in made.state.items()}
    mask = peft.mask(method, variables)
    trainable, extra, frozen = state.split(variables, mask)
    make = lambda t, e: state.create(t, tx, jax.random.key(0), e)  # noqa: E731
    start = jax.eval_shape(make, trainable, extra)
    step = make_step(
        method.task(loss) if method.task else loss,
        tx,
        realise=lambda v: peft.realised(method, v, sites),
        penalty=method.penalty,
        update=method.update,
        rates=method.rates,
        clip_norm=1.0,
    )
    places = (
        meshes.state_shardings(axes, start, mesh),
        meshes.shardings(axes, frozen, mesh),
        meshes.batch_sharding(mesh),
    )
    return step, (start, frozen, made.batch), places, mesh


def resident(start: Any, frozen: Any, places: tuple) -> dict[str, int]:
    """Bytes on each chip, by class, of what is there between steps."""

    def held(leaves: Any, where: Any) -> int:
        local = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype), leaves, where)
        plain = [x for x in jax.tree.leaves(local) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
        return tree.nbytes(plain)

    where = places[0]
    return {
        "base": held(frozen, places[1]) + held(start.extra, where.extra),
        "trainable": held(start.trainable, where.trainable),
        "optimiser": held(start.opt_state, where.opt_state),
    }


def plan(job: Job, spec: str, micro: int = 1) -> dict[str, Any]:
    """Compiles the step; sizes are bytes, per chip; times are seconds. A program too large for the chip is a plan that
    doesn't fit, with the compiler's own words.
    """
    step, (start, frozen, batch), places, mesh = program(job, spec, micro)
    chip = chips.chip(job.topology)
    axes = {name: size for name, size in mesh.shape.items() if size > 1} or {"data": 1}
    memory = resident(start, frozen, places)
    out = {**dataclasses.asdict(job), "mesh": ",".join(f"{n}:{k}" for n, k in axes.items()), "micro_batches": micro}
    out |= {"chips": mesh.size, "hbm": chip.hbm, "units": job.units[0], "unit": job.units[1]}
    # A kernel hides its products: those of xla's attention are counted, masked ones included.
    plain = step if job.attention == "xla" else program(dataclasses.replace(job, attention="xla"), spec, micro)[0]
    with meshes.use(mesh):
        out["flops"] = count.matmul_flops(jax.make_jaxpr(plain)(start, frozen, batch).jaxpr) / mesh.size
        try:
            compiled = compile_step(step, start, frozen, batch, places)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = " ".join(str(error).split())[:300]
            return out | {"memory": memory, "fits": False, "reason": reason, "seconds": {}}
    found, cost = compiled.memory_analysis(), compiled.cost_analysis()
    memory["activations"] = found.temp_size_in_bytes + max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    text = compiled.as_text()
    kinds = count.collectives(text)
    # XLA counts a loop's body once, for bytes as for FLOPs: what it misses of the one it misses of the other.
    traffic = cost["bytes accessed"] * max(1.0, out["flops"] / max(cost["flops"], 1.0))
    seconds = {
        "products": out["flops"] / chip.flops,
        "HBM": traffic / chip.hbm_bandwidth,
        "links": sum(c.nbytes for c in kinds.values()) / chip.ici_bandwidth,
    }
    return out | {
        "memory": memory,
        "fits": sum(memory.values()) <= FITS * chip.hbm,
        "xla_flops": cost["flops"],
        "bytes": traffic,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": {kind: c._asdict() for kind, c in kinds.items()},
        "seconds": seconds,
        "roofline": max(seconds.values()),
        "limit": max(seconds, key=seconds.get),
    }


def suggest(job: Job, most: int) -> list[dict[str, Any]]:
    """Compiles the `most` likeliest of all meshes over data, fsdp and tensor with 1, 2, 4 or 8 micro-batches, and
    returns them, those that fit first, then the quickest.

    Likeliest: what stays between steps fits; then as little tensor parallelism and as few micro-batches as may be.
    """
    devices = len(chips.devices(job.topology))
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    tried = []
    for data, fsdp in itertools.product(divisors, divisors):
        if devices % (data * fsdp):
            continue
        tensor = devices // (data * fsdp)
        spec = f"data:{data},fsdp:{fsdp},tensor:{tensor}"
        for micro in (1, 2, 4, 8):
            if job.batch % (data * fsdp * micro) == 0:
                tried.append((tensor, micro, -fsdp, spec))
    hbm, chosen = chips.chip(job.topology).hbm, []
    for _, micro, _, spec in sorted(tried):
        _, (start, frozen, _), places, _ = program(job, spec, micro)
        if sum(resident(start, frozen, places).values()) < hbm:
            chosen.append((spec, micro))
        if len(chosen) == most:
            break
    if not chosen:
        raise FlagError(f"{job.model} with {job.peft} fits on no mesh of {job.topology}: take a larger slice.")
    plans = [plan(job, spec, micro) for spec, micro in chosen]
    return sorted(plans, key=lambda p: (not p["fits"], p.get("roofline", float("inf"))))


def table(p: dict[str, Any]) -> str:
    """A plan as text."""
    rows = [[f"HBM, {name}", f"{size / GIB:.2f} GiB"] for name, size in p["memory"].items()]
    total = sum(p["memory"].values())
    verdict = "fits" if p["fits"] else "DOES NOT FIT"
    rows.append(["HBM, all", f"{total / GIB:.2f} of {p['hbm'] / GIB:.0f} GiB: {verdict}"])
    if "reason" in p:
        rows.append(["the compiler", p["reason"]])
    rows.append(["matmul FLOPs", f"{p['flops']:.3e}"])
    if p["seconds"]:
        rows.append(["HBM traffic", f"{p['bytes'] / GIB:.1f} GiB"])
        if p["kernels"]:
            rows.append(["Pallas kernels", f"{p['kernels']} in the program"])
        for kind, c in sorted(p["collectives"].items()):
            rows.append([kind, f"{c['count']} times, {c['nbytes'] / GIB:.2f} GiB"])
        rows += [[f"time of {name} alone", f"{1000 * s:.1f} ms"] for name, s in p["seconds"].items()]
        rate = p["units"] / p["roofline"]
        rows.append(
            ["at best", f"{1000 * p['roofline']:.1f} ms a step, {rate:,.0f} {p['unit']}/s; limit: {p['limit']}"]
        )
    size = f"{p['batch']} images" if p["unit"] == "images" else f"{p['batch']} x {p['seq']} tokens"
    head = (
        f"{p['task']} step of {p['model']} {p['peft']} on {p['topology']} ({p['chips']} chips), mesh {p['mesh']}, "
        f"{size} in {p['micro_batches']} part(s), remat {p['remat']}, {p['attention']} attention, {p['dtype']}"
    )
    return head + "\nper chip and step:\n" + tabulate(rows, tablefmt="github", headers=["", ""])


if __name__ == "__main__":
    define_flags()
    common.run(main)
