"""What is left of a step that is not finite: its batch in a file, and a line that says where to look."""

import io
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.errors import ModelError
from research.files import write_bytes
from research.peft import tree
from research.train import host
from research.train.checkpoint import Checkpointer

PyTree = Any


def save_batch(folder: Path, done: int, batch: PyTree) -> str:
    """Writes the batch of step `done` as .npz, a leaf under its path, and says where; a disk that refuses it is no
    further error.
    """
    path = folder / f"nonfinite-{done}.npz"
    leaves = {name: host.part(x) for name, x in tree.paths(batch).items()}
    content = io.BytesIO()
    np.savez(content, **leaves)
    try:
        write_bytes(path, content.getvalue())
    except ModelError as error:
        return f"; its batch is lost: {error}"
    return f"; its batch is in {path}"


def report(
    done: int, metrics: dict[str, np.ndarray], variables: PyTree, batch: PyTree, checkpointer: Checkpointer | None
) -> str:
    """What was not finite after step `done`: of loss and norms, of seeds, and which leaves of batch and variables."""
    bad = [str(i) for i in np.flatnonzero(~np.atleast_1d(metrics["finite"]))]
    seeds = f" (seeds {', '.join(bad)})" if np.ndim(metrics["finite"]) else ""
    values = ", ".join(
        f"{name} {np.array2string(np.asarray(metrics[name]), precision=4)}"
        for name in ("loss", "grad_norm", "update_norm")
    )
    wrong = [f"batch/{name}" for name, x in tree.paths(batch).items() if not _finite(x)]
    wrong += [name for name, x in tree.paths(variables).items() if not _finite(x)]
    found = f"not finite before it: {', '.join(wrong[:10])}" if wrong else "Lower the learning rate or clip gradients"
    kept = f"; the last good checkpoint is in {checkpointer.directory}" if checkpointer else ""
    return f"step {done}{seeds} is not finite: {values}. Its update was not applied{kept}. {found}"


def _finite(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.inexact) or bool(jnp.isfinite(x).all())
