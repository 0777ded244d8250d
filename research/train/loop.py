"""The training loop, the only one: every task, method, mesh and number of seeds runs through `fit`.

Whatever happens, what was complete before stays: a run killed at any moment goes on from its last checkpoint and ends
with the same bits as one never stopped, because batches and random numbers are functions of the step alone.
"""

import math
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError, ModelError
from research.train import distributed, guard
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
    prepare: Callable[[int, TrainState], TrainState] | None = None,
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
    watch: Callable[[int, float], str] | None = None,
) -> Result:
    """Trains to `steps` steps, going on from the newest checkpoint if there is one.

    A checkpoint is written while the next steps run; the last one, and that of an interrupted run, is waited for. Of
    several processes the first writes, and all stop together after the same step when one of them is told to.

    Args:
        step_fn: compiled or jitted, donating its first argument: `state` must not be used after the call.
        batch: step -> batch, a pure function: the position in the data is the step.
        prepare: (step, state) -> state before each step, a pure function too: a policy samples what it learns from into
            `state.extra`, so that a checkpoint between two samplings holds it.
        evaluate: (state, stop) -> means, or None if `stop()` became true; every `eval_every` steps and after the last.
        save_every: save every so many steps; with a checkpointer the last step and an interrupted one are always saved.
        identity: JSON that must be the same when a run is resumed (configuration, method, fingerprint of the base).
        unit: what `weight` counts, for the rate shown. Batches with a numpy leaf `mask` show its ones, as tokens.
        best_metric: keep the trainables where this metric was largest (best_mode "min": smallest), for each seed apart.
        skip_nonfinite: how many batches with a non-finite loss or gradient may be left out before the run stops. With
            a writer each such batch is saved beside its rows, as nonfinite-STEP.npz.
        watch: (step, seconds) -> text for the progress line, after each step, `seconds` the median of the latest.
    Raises:
        ModelError: loss or gradients are not finite, or a checkpoint is damaged, of another run or cannot be written.
        Interrupted: after SIGINT or SIGTERM, when all is saved.
    """
    if steps < 1:
        raise FlagError(f"steps={steps}: at least 1")
    if best_metric and evaluate is None:
        raise ValueError("best_metric without evaluate")

    # ---------------------------------------------------------------- where to begin
    best = _no_best(state) if best_metric else None
    start, seconds, times, evaluated, history, score = 0, 0.0, [], None, [], math.nan
    found = checkpointer.latest_step() if checkpointer else None
    if found is not None:
        saved, meta = checkpointer.restore(found, {"state": state, "best": best}, {"identity": identity})
        state, best = saved["state"], saved["best"]
        start, seconds, times, evaluated = found, meta["seconds"], meta.get("times", []), meta["evaluated"]
        if start > steps:
            raise FlagError(f"steps={steps}, but {checkpointer.directory} already holds step {start}")
        say(f"{label or 'train'}: going on from step {start} in {checkpointer.directory}")
    writer = writer if distributed.is_main() else None
    if writer:
        history = writer.resume(start)

    def record(entry: Row) -> None:
        history.append(entry)
        if writer:
            writer.write(entry)

    def save(done: int, wait: bool = True) -> None:
        if checkpointer:
            judged = score if evaluated == done and math.isfinite(score) else None
            recent = [round(t, 6) for t in times[-200:]]  # for the median of a run that is resumed near its end
            meta = {"identity": identity, "seconds": seconds, "times": recent, "evaluated": evaluated, "data": done}
            checkpointer.save(done, {"state": state, "best": best}, meta, judged, wait)

    def due(every: int, done: int) -> bool:
        return done == steps or (every > 0 and done > 0 and done % every == 0)

    with catch() as signalled:
        stopped = distributed.Together(signalled)
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
            done, metrics, fed = pending[0], jax.device_get(pending[1]), pending[2]
            now, pending = time.perf_counter(), None
            took, clock = now - clock, now
            if done > start + 1:  # the first step may have compiled
                seconds += took
                times.append(took)
            entry = row(done, metrics)
            if not entry["finite"]:
                record(entry)
                skipped += 1
                saved = guard.save_batch(writer.path.parent, done, fed) if writer else ""
                if skipped > skip_nonfinite:
                    raise ModelError(guard.report(done, metrics, state.variables(frozen), fed, checkpointer) + saved)
            elif done % log_every == 0 or done == steps:
                record(entry)
            recent = max(statistics.median(times[-20:] or [took]), 1e-9)
            tokens = _tokens(fed)
            work = (float(np.sum(metrics["weight"])), unit) if tokens is None else (tokens, "tokens")
            progress.update(done, entry["loss"], work[0] / recent, work[1], watch(done, recent) if watch else "")

        def pause_for_evaluation(done: int) -> None:
            nonlocal best, evaluated, score, clock
            means = evaluate(state, stopped.alone)
            if means is not None:
                record(row(done, means, "eval/"))
                evaluated = done
                if best_metric:
                    value = jnp.asarray(means[best_metric], jnp.float32) * (1 if best_mode == "max" else -1)
                    best = _keep_best(best, value, done, state)
                score = float(jnp.mean(value)) if best_metric else -float(np.mean(means.get("loss", math.nan)))
            clock = time.perf_counter()

        def leave_if_stopped(done: int, saved: bool) -> None:
            if stopped(done):
                if not saved:
                    save(done)
                elif checkpointer:
                    checkpointer.wait()
                at = f", saved in {checkpointer.directory}" if checkpointer else ""
                number = signalled.number or signal.SIGTERM  # another process's
                say(f"stopped by {signal.Signals(number).name} at step {done}{at}")
                raise Interrupted(128 + number)

        try:
            # -------------------------------------------------------- steps
            if start and evaluate and due(eval_every, start) and evaluated != start:
                pause_for_evaluation(start)  # the run was stopped in this evaluation
                leave_if_stopped(start, saved=False)
                save(start)
            if start < steps and not isinstance(step_fn, jax.stages.Compiled):
                say(f"{label or 'train'}: compiling ...")
            clock = time.perf_counter()
            feed = _fetch(batch, start) if start < steps else None
            for done in range(start + 1, steps + 1):
                if prepare:
                    state = prepare(done - 1, state)
                state, metrics = step_fn(state, frozen, feed)
                settle()  # of the step before, while this one runs
                pending = (done, metrics, feed)
                if done < steps:
                    feed = _fetch(batch, done)  # on the host, while the device works
                if checkpointer:
                    checkpointer.check()

                evaluating, saving = evaluate and due(eval_every, done), checkpointer and due(save_every, done)
                stopping = stopped(done)
                if not (evaluating or saving or stopping):
                    continue
                settle()
                if evaluating and not stopping:
                    pause_for_evaluation(done)
                if saving:
                    save(done, wait=done == steps)
                leave_if_stopped(done, saved=bool(saving))
                clock = time.perf_counter()
            settle()
        finally:
            progress.close()
            if checkpointer:
                checkpointer.close()
    if best_metric and best_mode == "min":
        best = best | {"value": -best["value"]}
    return Result(state, history, best, seconds, 1000 * statistics.median(times) if times else 0.0)


def _fetch(batch: Callable[[int], PyTree], index: int) -> PyTree:
    try:
        return batch(index)
    except Exception as error:
        error.add_note(f"in making the batch of step {index + 1}")
        raise


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
