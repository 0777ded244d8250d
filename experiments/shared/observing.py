"""What `training.train` shows of a run beyond metrics.jsonl: --track, --profile, --peak_tflops, memory by class."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from absl import flags

from research.train import metrics, observe, step
from research.train.count import matmul_flops
from research.train.distributed import is_main

MIB = 2**20


def value(name: str, default: Any) -> Any:
    """A flag's value, or the default where the script has no such flag."""
    return flags.FLAGS[name].value if name in flags.FLAGS else default


def check() -> None:
    """FlagError where --track names what is not installed."""
    if "wandb" in value("track", []):
        observe.check_wandb()


@contextmanager
def observed(
    run: Any, batch: Any, compiled: jax.stages.Compiled, workdir: Path, identity: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Options of `loop.fit`, for a run that is about to train: writer, watch, skip_nonfinite. Prints one line on its
    memory. `batch`: the first one.
    """
    wanted = value("track", []) if is_main() else []
    sizes = ", ".join(f"{name} {size / MIB:,.1f}" for name, size in memory(run, compiled).items())
    print(f"MiB per device: {sizes}", flush=True)
    name = hashlib.blake2b(str(workdir.resolve()).encode(), digest_size=8).hexdigest()
    makers = {
        "tensorboard": lambda: observe.TensorBoard(workdir / "tensorboard"),
        "wandb": lambda: observe.Wandb(workdir, identity, project="peftree", name=workdir.name, id=name),
    }
    trackers = [observe.Tracker(kind, makers[kind]) for kind in dict.fromkeys(wanted)]
    writer = metrics.Writer(workdir / "metrics.jsonl", trackers)
    given = value("peak_tflops", None)
    peak = observe.peak(given and 1e12 * given)
    flops = matmul_flops(jax.make_jaxpr(run.step)(run.state, run.frozen, batch).jaxpr) if peak else 0.0
    watch = observe.Watch(flops, peak, value("profile", 0), workdir / "profile", track=writer.track)
    try:
        yield {"writer": writer, "watch": watch, "skip_nonfinite": value("skip_nonfinite", 0)}
    finally:
        watch.close()
        for tracker in trackers:
            tracker.close()


def memory(run: Any, compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on one device by class: base, trainable, optimiser, activations and gradients, all."""
    peak = step.memory(compiled)["peak"]
    held = {
        "base": _held((run.frozen, run.state.extra)),
        "trainable": _held(run.state.trainable),
        "optimiser": _held(run.state.opt_state),
    }
    return held | {"activations and gradients": max(0, peak - sum(held.values())), "all": peak}


def _held(leaves: Any) -> int:
    plain = [x for x in jax.tree.leaves(leaves) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(x.addressable_shards[0].data.nbytes if isinstance(x, jax.Array) else x.nbytes for x in plain)
