"""One of two processes: python -m tests.train.workers PORT PROCESS {train,fail,kill,fit} [FOLDER]. Prints losses."""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from research.train import distributed
from research.train import mesh as meshes

STEPS = 4


def train(case, mesh) -> list[float]:
    """Losses of LoRA on the tiny decoder."""
    from research.peft import method as peft
    from research.train import step as steps
    from tests import tiny

    state, frozen = case.start()
    axes = {"params": peft.base(case.model)[1], "peft": peft.init_axes(case.method, case.sites)}
    places = (
        meshes.state_shardings(axes, state, mesh),
        meshes.shardings(axes, frozen, mesh),
        meshes.batch_sharding(mesh),
    )
    losses = []
    with meshes.use(mesh):
        shapes = jax.eval_shape(lambda *x: x, state, frozen, tiny.micro(tiny.batch(), 1))
        compiled = steps.compile(case.stepper(), *shapes, places)
        state, frozen = meshes.load(state, places[0]), meshes.load(frozen, places[1])
        for i in range(STEPS):
            rows = tiny.micro(jax.tree.map(np.asarray, tiny.batch(seed=i)), 1)
            state, metrics = compiled(state, frozen, meshes.place_batch(rows, places[2]))
            losses.append(float(metrics["loss"]))
    return losses


def main(port: str, process: str, what: str, folder: str = "") -> None:
    with distributed.run(distributed.find(f"127.0.0.1:{port}", 2, int(process)), heartbeat=10) as writes:
        assert jax.device_count() == 4 and writes == (process == "0")
        if what == "fail" and process == "1":
            raise RuntimeError("the disk is full")
        if what == "kill" and process == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if what in ("fail", "kill"):
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("waits for the other")
        if what == "fit":  # until one of them is told to stop
            from tests.train import toy

            seen = lambda done, seconds: signalled(done, process)  # noqa: E731
            toy.fit(Path(folder), meshes.make_mesh("data:2,fsdp:2"), 1000, save_every=2, watch=seen)
        from tests import tiny

        print(*train(tiny.Case("lora", "decoder"), meshes.make_mesh("data:2,fsdp:2")))


def signalled(done: int, process: str) -> str:
    """Process 1 is told to stop when step 7 is done."""
    if process == "1" and done == 7:
        os.kill(os.getpid(), signal.SIGTERM)
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
