"""What a run would take, before it takes it: --dry_run of every training script."""

import jax
import numpy as np
from tabulate import tabulate

from experiments.shared import observing
from experiments.shared.training import Batch, Recipe, Run, compile_step

GIB = 2**30


def dry_run(run: Run, batch: Batch, recipe: Recipe, mesh: jax.sharding.Mesh | None = None, show: str = "") -> str:
    """What a run would take, from the compiled step: bytes per device by class, rows and steps, the shapes of a batch,
    and `show`, the script's own picture of what is learnt from.
    """
    first, sizes = batch(0), observing.memory(run, compile_step(run, batch, mesh)[0])
    rows = [[name, f"{size / GIB:.3f} GiB"] for name, size in sizes.items()]
    shapes = [[name, "x".join(map(str, np.shape(x))), str(np.asarray(x).dtype)] for name, x in first.items()]
    where = "one device" if mesh is None else f"mesh {', '.join(f'{n}:{k}' for n, k in mesh.shape.items() if k > 1)}"
    parts = [
        f"{recipe.steps} steps of {recipe.batch_size} rows in {recipe.micro_batches} part(s), {where}",
        tabulate(rows, headers=["memory per device", ""], tablefmt="github"),
        tabulate(shapes, headers=["leaf of a batch", "shape", "type"], tablefmt="github"),
        show,
    ]
    return "\n\n".join(part for part in parts if part)
