"""Kills a tiny run by SIGKILL at random moments and flips bits in its checkpoints: neither may change how it ends.

    python -m experiments.kill_test --count=200 --flips=500

A run of a toy model (a low-rank update of one matrix, and a head) saves every other step. Each kill falls at a moment
drawn evenly over the time that a whole run takes, saving included; the run is then started again, and killed again, as
often as it takes it to end. Its parameters, optimiser state, best trainables and metrics must be those of a run that
was never killed, bit for bit. Then bits of the newest checkpoint are flipped, one at a time: each must be found, and
the step before it taken. Prints a summary and writes result.json under --workdir; what went wrong stays there, and the
exit status is 1. (`tests/train/test_faults.py` kills at named points instead.)
"""

import functools
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.shared import common
from research.errors import ModelError
from research.files import write_bytes
from research.tasks.loss import Loss
from research.train import integrity, loop, optimizer, state, step
from research.train.checkpoint import Checkpointer
from research.train.lock import lock
from research.train.metrics import Writer

D, RANK, STEPS, KEEP = 16, 2, 12, 3
MASK = {"params": {"w": False}, "peft": {"a": True, "b": True}, "head": {"h": True}}
# Not to be imported in a child.
PRELOAD = ["experiments.shared.common", "optax", "orbax.checkpoint", "research.train.loop"]
Hook = Callable[[str, int], None]


def define_flags() -> None:
    flags.DEFINE_integer("count", 200, "Kills.", lower_bound=0)
    flags.DEFINE_integer("flips", 500, "Flipped bits.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the moments and the bits.")
    flags.DEFINE_string("workdir", "runs/kill_test", "Where everything is written.")


def main() -> None:
    values = flags.FLAGS
    workdir, rng = Path(values.workdir).expanduser(), random.Random(values.seed)
    with lock(workdir):
        found = kills(workdir, values.count, rng) | flips(workdir / "whole" / "checkpoints", values.flips, rng)
        common.write_json(workdir / "result.json", {"seed": values.seed} | found | common.environment())
    print(
        f"{found['kills']} kills ({found['in_a_save']} in a save) in {found['runs']} runs: {found['equal']} ended as "
        f"the one never killed; {found['flips']} flipped bits: {found['found']} found"
    )
    if found["equal"] < found["runs"] or found["found"] < found["flips"]:
        sys.exit(1)


# -------------------------------------------------------------------- the run


def batch(k: int) -> dict[str, np.ndarray]:
    """Leaves [1, B, ...] of step k."""
    x = np.random.default_rng(k).normal(size=(1, 8, D)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(-1))}


def loss(v: dict, rows: dict, rng: jax.Array | None) -> Loss:
    x = rows["x"] if rng is None else rows["x"] * jax.random.bernoulli(rng, 0.9, rows["x"].shape)
    y = jnp.tanh(x @ (v["params"]["w"] + v["peft"]["a"] @ v["peft"]["b"])) @ v["head"]["h"]
    return Loss(((y - rows["y"]) ** 2).sum(), jnp.float32(len(y)), {})


@functools.cache
def pieces() -> tuple:
    """An optimiser, variables and the compiled step and evaluation: made once a process."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32) / 4)  # noqa: E731
    variables = {"params": {"w": normal(D, D)}, "peft": {"a": normal(D, RANK), "b": normal(RANK, D)}}
    variables["head"] = {"h": normal(D)}
    tx = optimizer.make("adamw", 1e-2)
    stepper = jax.jit(step.make_step(loss, tx), donate_argnums=(0,))
    return tx, variables, stepper, step.make_eval(loss)


def run(folder: Path, hook: Hook = lambda point, k: None, **options: Any) -> bytes:
    """Trains, or goes on, and returns all bits of the end. `hook` is called at "batch", "step" and "eval"."""
    tx, variables, stepper, evaluating = pieces()
    trainable, extra, frozen = state.split(variables, MASK)

    def one(*args: Any) -> Any:
        out = stepper(*args)
        hook("step", 0)
        return out

    def fed(k: int) -> Any:
        hook("batch", k)
        return batch(k)

    def evaluate(s: state.TrainState, stop: Callable[[], bool]) -> dict[str, Any] | None:
        rows = [{name: x[0] for name, x in batch(k).items()} for k in (100, 101)]
        hook("eval", 0)
        return evaluating(s, frozen, rows, stop)

    options = {"save_every": 2, "eval_every": 3, "best_metric": "loss", "best_mode": "min", "steps": STEPS} | options
    result = loop.fit(
        one, state.create(trainable, tx, jax.random.key(0), extra), frozen, fed, evaluate=evaluate,
        checkpointer=Checkpointer(folder / "checkpoints", keep=KEEP), writer=Writer(folder / "metrics.jsonl"),
        identity={"toy": D}, **options,
    )  # fmt: skip
    rest = result.state.replace(rng=jax.random.key_data(result.state.rng))
    leaves = jax.tree.leaves((rest, result.best))
    return b"".join(np.asarray(x).tobytes() for x in leaves) + (folder / "metrics.jsonl").read_bytes()


def child(folder: Path, ready: Any) -> None:
    """A process that trains and leaves its end in a file."""
    quiet()
    pieces()
    began = time.perf_counter()
    ready.send(0.0)
    end = run(folder)
    took = time.perf_counter() - began
    write_bytes(folder / "end", end)
    ready.send(took)


# -------------------------------------------------------------------- what is done to it


def processes() -> Any:
    """Starts children by forking a process that has imported everything and has no device yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def quiet() -> None:
    """For a process that is to be killed: nothing on stderr, and no semaphore (tqdm's) that would be left behind."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    tqdm.set_lock(threading.RLock())


def start(folder: Path) -> tuple[Any, Any]:
    """A child that is about to train, and the pipe that it says how long it took on."""
    context = processes()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(folder, theirs))
    process.start()
    theirs.close()
    ours.recv()
    return process, ours


def kills(workdir: Path, count: int, rng: random.Random) -> dict[str, int]:
    """Kills runs `count` times and lets each end."""
    for old in [workdir / "whole", *workdir.glob("killed-*")]:
        shutil.rmtree(old, ignore_errors=True)
    process, pipe = start(workdir / "whole")
    length = pipe.recv()
    process.join()
    whole = (workdir / "whole" / "end").read_bytes()
    done = in_a_save = runs = equal = 0
    while done < count or runs == 0:
        folder = workdir / f"killed-{runs}"
        while not (folder / "end").exists():
            process, pipe = start(folder)
            if done < count and not pipe.poll(rng.uniform(0, length)):
                process.kill()
            process.join()
            if process.exitcode == -9:
                done += 1
                in_a_save += any((folder / "checkpoints").glob(".saving-*"))
                print(f"\r{done} of {count} kills, {runs} runs ended", end="", file=sys.stderr, flush=True)
            elif process.exitcode:
                raise ModelError(f"{folder} could not go on: exit status {process.exitcode}")
        runs += 1
        if (folder / "end").read_bytes() == whole:
            equal += 1
            shutil.rmtree(folder)
    print(file=sys.stderr)
    return {"kills": done, "in_a_save": in_a_save, "runs": runs, "equal": equal, "seconds_of_a_run": length}


def flips(directory: Path, count: int, rng: random.Random) -> dict[str, int]:
    """Flips single bits of the newest step: every other one anywhere, the rest in a file drawn first."""
    checkpointer = Checkpointer(directory)
    newest, before, *_ = checkpointer._steps()
    files = [f for f in sorted((directory / str(newest)).rglob("*")) if f.is_file() and f.stat().st_size]
    sizes, found, stderr = [f.stat().st_size for f in files], 0, sys.stderr
    with open(os.devnull, "w") as sys.stderr:  # one line on each
        try:
            for i in range(count):
                file = rng.choices(files, sizes)[0] if i % 2 else rng.choice(files)
                good = file.read_bytes()
                bad = bytearray(good)
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
                file.write_bytes(bad)
                found += checkpointer.latest_step() == before
                file.write_bytes(good)
        finally:
            sys.stderr = stderr
    whole = checkpointer.latest_step() == newest and integrity.fault(directory / str(before), before) is None
    return {"flips": count, "found": found if whole else 0}


if __name__ == "__main__":
    define_flags()
    common.run(main)
