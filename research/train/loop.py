"""The training loop, the only one: every task, method, mesh and number of seeds runs through `fit`.

Whatever happens, what was complete before stays: a run killed at any moment goes on from its last checkpoint and ends
with the same bits as one never stopped, because batches and random numbers are functions of the step alone.
"""

import signal
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError, ModelError
from research.train.checkpoint import Checkpointer
from research.train.metrics import Progress, Row, Writer, row, say
from research.train.signals import Interrupted, catch
from research.train.state import TrainState

PyTree = Any


class Result(NamedTuple):
    """`best` is None or {"value", "step", "trainable", "extra"}, [S, ...] with seeds; its step is -1 if none was.

    `seconds` is training time without compilation, evaluation and saving, `step_ms` the median step; of a resumed run
    both are of its earlier parts too. A process's first step may have compiled and counts in neither: when there was no
    other (steps=1), both are 0.0.
    """

    state: TrainState
    history: list[Row]
    best: PyTree
    seconds: float
    step_ms: float


def fit(
    step_fn: Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: PyTree,
    batch: Callable[[int], PyTree],
    *,
    steps: int,
    evaluate: Callable[[TrainState, Callable[[], bool]], dict[str, Any] | None] | None = None,
    eval_every: int = 0,
    checkpointer: Checkpointer | None = None,
    save_every: int = 0,
    identity: dict[str, Any] | None = None,
    writer: Writer | None = None,
    log_every: int = 1,
    label: str = "",
    unit: str = "rows",
    best_metric: str | None = None,
    best_mode: str = "max",
    skip_nonfinite: int = 0,
) -> Result:
    """Trains to `steps` steps, going on from the newest checkpoint if there is one.

    Args:
        step_fn: compiled or jitted, donating its first argument: `state` must not be used after the call.
        batch: step -> batch, a pure function: the position in the data is the step.
        evaluate: (state, stop) -> means, or None if `stop()` became true; every `eval_every` steps and after the last.
        save_every: save every so many steps; with a checkpointer the last step and an interrupted one are always saved.
        identity: JSON that must be the same when a run is resumed (configuration, method, fingerprint of the base).
        unit: what `weight` counts, for the rate shown. Batches with a numpy leaf `mask` show its ones, as tokens.
        best_metric: keep the trainables where this metric was largest (best_mode "min": smallest), for each seed apart.
        skip_nonfinite: how many batches with a non-finite loss or gradient may be left out before the run stops.
    Raises:
        ModelError: loss or gradients are not finite, or a checkpoint is damaged or of another run.
        Interrupted: after SIGINT or SIGTERM, when all is saved.
    """
    if steps < 1:
        raise FlagError(f"steps={steps}: at least 1")
    if best_metric and evaluate is None:
        raise ValueError("best_metric without evaluate")

    # ---------------------------------------------------------------- where to begin
    best = _no_best(state) if best_metric else None
    start, seconds, times, evaluated, history = 0, 0.0, [], None, []
    found = checkpointer.latest_step() if checkpointer else None
    if found is not None:
        saved, meta = checkpointer.restore(found, {"state": state, "best": best}, {"identity": identity})
        state, best = saved["state"], saved["best"]
        start, seconds, times, evaluated = found, meta["seconds"], meta.get("times", []), meta["evaluated"]
        if start > steps:
            raise FlagError(f"steps={steps}, but {checkpointer.directory} already holds step {start}")
        say(f"{label or 'train'}: going on from step {start} in {checkpointer.directory}")
    if writer:
        history = writer.resume(start)

    def record(entry: Row) -> None:
        history.append(entry)
        if writer:
            writer.write(entry)

    def save(done: int) -> None:
        if checkpointer:
            recent = [round(t, 6) for t in times[-200:]]  # for the median of a run that is resumed near its end
            meta = {"identity": identity, "seconds": seconds, "times": recent, "evaluated": evaluated, "data": done}
            checkpointer.save(done, {"state": state, "best": best}, meta)

    def due(every: int, done: int) -> bool:
        return done == steps or (every > 0 and done > 0 and done % every == 0)

    with catch() as stopped:
        # ------------------------------------------------------------ what is done with the metrics of a finished step
        progress = Progress(start, steps, label)
        skipped, clock, pending = 0, None, None

        def settle() -> None:
            """Waits for the last dispatched step and reports it.

            The one before a save or an evaluation is always settled, so neither sees a bad step.
            """
            nonlocal pending, clock, seconds, skipped
            if pending is None:
                return
            done, metrics, tokens = pending[0], jax.device_get(pending[1]), pending[2]
            now, pending = time.perf_counter(), None
            took, clock = now - clock, now
            if done > start + 1:  # the first step may have compiled
                seconds += took
                times.append(took)
            entry = row(done, metrics)
            if not entry["finite"]:
                record(entry)
                skipped += 1
                if skipped > skip_nonfinite:
                    raise ModelError(_nonfinite(done, metrics, checkpointer))
            elif done % log_every == 0 or done == steps:
                record(entry)
            recent = max(statistics.median(times[-20:] or [took]), 1e-9)
            work = (float(np.sum(metrics["weight"])), unit) if tokens is None else (tokens, "tokens")
            progress.update(done, entry["loss"], work[0] / recent, work[1])

        def pause_for_evaluation(done: int) -> None:
            nonlocal best, evaluated, clock
            means = evaluate(state, stopped)
            if means is not None:
                record(row(done, means, "eval/"))
                evaluated = done
                if best_metric:
                    value = jnp.asarray(means[best_metric], jnp.float32) * (1 if best_mode == "max" else -1)
                    best = _keep_best(best, value, done, state)
            clock = time.perf_counter()

        def leave_if_stopped(done: int, saved: bool) -> None:
            if stopped():
                if not saved:
                    save(done)
                at = f", saved in {checkpointer.directory}" if checkpointer else ""
                say(f"stopped by {signal.Signals(stopped.number).name} at step {done}{at}")
                raise Interrupted(128 + stopped.number)

        try:
            # -------------------------------------------------------- steps
            if start and evaluate and due(eval_every, start) and evaluated != start:
                pause_for_evaluation(start)  # the run was stopped in this evaluation
                leave_if_stopped(start, saved=False)
                save(start)
            if start < steps and not isinstance(step_fn, jax.stages.Compiled):
                say(f"{label or 'train'}: compiling ...")
            clock = time.perf_counter()
            feed = batch(start) if start < steps else None
            for done in range(start + 1, steps + 1):
                state, metrics = step_fn(state, frozen, feed)
                settle()  # of the step before, while this one runs
                pending = (done, metrics, _tokens(feed))
                if done < steps:
                    feed = batch(done)  # on the host, while the device works

                pausing = (evaluate and due(eval_every, done)) or (checkpointer and due(save_every, done)) or stopped()
                if not pausing:
                    continue
                settle()
                if evaluate and due(eval_every, done) and not stopped():
                    pause_for_evaluation(done)
                if saving := bool(checkpointer and due(save_every, done)):
                    save(done)
                leave_if_stopped(done, saved=saving)
                clock = time.perf_counter()
            settle()
        finally:
            progress.close()
    if best_metric and best_mode == "min":
        best = best | {"value": -best["value"]}
    return Result(state, history, best, seconds, 1000 * statistics.median(times) if times else 0.0)


def _tokens(batch: PyTree) -> int | None:
    """Real tokens of a batch; None without a mask, or with one on the device, where counting would cost a transfer."""
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    return int(mask.sum()) if isinstance(mask, np.ndarray) else None


# -------------------------------------------------------------------- early selection


def _no_best(state: TrainState) -> PyTree:
    """The best so far before any evaluation; per seed if the state has a seed axis."""
    return {
        "value": jnp.full(state.step.shape, -jnp.inf, jnp.float32),
        "step": jnp.full(state.step.shape, -1, jnp.int32),
        "trainable": jax.tree.map(jnp.copy, state.trainable),
        "extra": jax.tree.map(jnp.copy, state.extra),
    }


@jax.jit
def _keep_best(best: PyTree, value: jax.Array, step: jax.Array, state: TrainState) -> PyTree:
    better = value > best["value"]
    new = {
        "value": value,
        "step": jnp.full_like(best["step"], step),
        "trainable": state.trainable,
        "extra": state.extra,
    }
    pick = lambda n, o: jnp.where(better.reshape(better.shape + (1,) * (o.ndim - better.ndim)), n, o)  # noqa: E731
    return jax.tree.map(pick, new, best)


def _nonfinite(done: int, metrics: dict[str, np.ndarray], checkpointer: Checkpointer | None) -> str:
    bad = [str(i) for i in np.flatnonzero(~np.atleast_1d(metrics["finite"]))]
    seeds = f" (seeds {', '.join(bad)})" if np.ndim(metrics["finite"]) else ""
    kept = f"; the last good checkpoint is in {checkpointer.directory}" if checkpointer else ""
    values = ", ".join(
        f"{name} {np.array2string(np.asarray(metrics[name]), precision=4)}"
        for name in ("loss", "grad_norm", "update_norm")
    )
    return (
        f"step {done}{seeds} is not finite: {values}. Its update was not applied{kept}. "
        "Lower the learning rate or clip gradients"
    )
