import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import FlagError, ModelError
from research.tasks.loss import Loss
from research.train import metrics, state, step
from research.train.checkpoint import Checkpointer
from research.train.loop import fit
from research.train.signals import Interrupted
from tests.train import toy

STEPS = 8


def data(k):
    return toy.batch(k, micro=2, drop=True)


FROZEN, STEPPER = toy.setup()[1:]
STEPPER, EVALUATE = jax.jit(STEPPER, donate_argnums=(0,)), step.make_eval(toy.loss)  # compiled once for all tests


def train(folder=None, steps=STEPS, batch=data, stepper=STEPPER, evaluating=True, **options):
    s, frozen = toy.setup()[0], FROZEN
    if folder:
        options |= {"checkpointer": Checkpointer(folder / "checkpoints"), "writer": metrics.Writer(folder / "m.jsonl")}
    if evaluating:
        options |= {
            "evaluate": lambda s, stop: EVALUATE(s, frozen, [toy.rows(100), toy.rows(101)], stop),
            "eval_every": 4,
            "best_metric": "loss",
            "best_mode": "min",
        }
    return fit(stepper, s, frozen, batch, steps=steps, **options)


class Died(Exception):
    pass


def test_trains_and_reports():
    out = train()
    assert int(out.state.step) == STEPS
    assert [r["step"] for r in out.history if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in out.history if "eval/loss" in r] == [4, 8]
    evals = {r["step"]: r["eval/loss"] for r in out.history if "eval/loss" in r}
    assert int(out.best["step"]) == min(evals, key=evals.get)
    np.testing.assert_allclose(out.best["value"], min(evals.values()), rtol=1e-6)
    assert out.step_ms > 0 and out.seconds > 0


@pytest.mark.parametrize("dies_at", [3, 4, 7])
def test_resumed_is_bit_identical_to_never_stopped(tmp_path, dies_at):
    whole = train(tmp_path / "whole", save_every=2)

    def dying(k):
        if k == dies_at:
            raise Died
        return data(k)

    with pytest.raises(Died):
        train(tmp_path / "part", batch=dying, save_every=2)
    resumed = train(tmp_path / "part", save_every=2)
    assert toy.same(resumed.state, whole.state)
    assert toy.same(resumed.best, whole.best)
    assert resumed.history == whole.history
    assert metrics.read(tmp_path / "part" / "m.jsonl") == metrics.read(tmp_path / "whole" / "m.jsonl")


def test_a_finished_run_is_not_run_again(tmp_path):
    whole = train(tmp_path)
    again = train(tmp_path, batch=lambda k: pytest.fail("asked for a batch"))
    assert toy.same(again.state, whole.state) and again.history == whole.history


def test_step_time_survives_a_resume_at_and_near_the_end(tmp_path):
    first = train(tmp_path, steps=4, evaluating=False)
    again = train(tmp_path, steps=4, evaluating=False)
    assert again.step_ms == pytest.approx(first.step_ms, abs=2e-3) and again.seconds == first.seconds
    near = train(tmp_path, steps=5, evaluating=False)  # one step, which does not count
    assert near.step_ms == again.step_ms > 0


def test_one_step_has_numbers_that_json_knows(tmp_path):
    out = train(tmp_path, steps=1, evaluating=False)
    assert json.dumps([out.step_ms, out.seconds], allow_nan=False) == "[0.0, 0.0]"
    again = train(tmp_path, steps=1, evaluating=False)
    assert (again.step_ms, again.seconds) == (0.0, 0.0)


@pytest.mark.parametrize("masked, unit", [(True, "tokens"), (False, "rows")])
def test_progress_counts_real_tokens_where_there_is_a_mask(monkeypatch, masked, unit):
    shown = []
    monkeypatch.setattr(metrics.Progress, "update", lambda self, *args: shown.append(args))
    monkeypatch.setattr("statistics.median", lambda times: 0.5)
    mask = np.arange(16 * 3).reshape(2, 8, 3) % 5 == 0

    def batch(k):
        return data(k) | ({"mask": mask} if masked else {})

    train(steps=3, batch=batch, evaluating=False)
    done, loss, rate, found, note = shown[-1]
    work = mask.sum() if masked else data(2)["weight"].sum()
    assert (done, found, rate, note) == (3, unit, 2 * work, "") and np.isfinite(loss)


def test_more_steps_go_on_and_fewer_are_refused(tmp_path):
    train(tmp_path, steps=4, evaluating=False)
    more = train(tmp_path, steps=6, evaluating=False)
    assert toy.same(more.state, train(steps=6, evaluating=False).state)
    with pytest.raises(FlagError, match="already holds step 6"):
        train(tmp_path, steps=5, evaluating=False)


def test_another_identity_is_refused(tmp_path):
    train(tmp_path, steps=2, evaluating=False, identity={"lr": 0.1, "method": "lora:rank=8"})
    with pytest.raises(ModelError, match="identity/method is 'lora:rank=8' there and 'ia3' here"):
        train(tmp_path, steps=4, evaluating=False, identity={"lr": 0.1, "method": "ia3"})


def test_damaged_newest_step_is_replayed_to_the_same_bits(tmp_path):
    whole = train(tmp_path, save_every=2)
    next((tmp_path / "checkpoints" / "8" / "state" / "d").iterdir()).write_bytes(b"")
    again = train(tmp_path, save_every=2)
    assert toy.same(again.state, whole.state) and again.history == whole.history


def nan_loss(v, batch, rng):
    """Not a number in the batches marked so."""
    out = toy.loss(v, batch, rng)
    return Loss(out.sum + jnp.where(batch["bad"].sum() > 0, jnp.nan, 0.0), out.weight, out.metrics)


NAN_STEPPER = jax.jit(toy.setup(loss=nan_loss)[2], donate_argnums=(0,))


def poisoned(at):
    def batch(k):
        b = data(k)
        return b | {"bad": np.full(b["y"].shape, float(k in at), np.float32)}

    return {"stepper": NAN_STEPPER, "batch": batch, "evaluating": False}


@pytest.mark.parametrize("bad", [4, 5])
def test_non_finite_loss_stops_and_the_last_good_checkpoint_stays(tmp_path, bad):
    with pytest.raises(ModelError) as error:
        train(tmp_path, save_every=2, **poisoned({bad}))
    text = str(error.value)
    assert f"step {bad + 1} is not finite" in text and str(tmp_path) in text and "\n" not in text
    assert Checkpointer(tmp_path / "checkpoints").latest_step() == 4
    assert [r["step"] for r in metrics.read(tmp_path / "m.jsonl")][-1] == bad + 1
    good = train(steps=4, evaluating=False)
    kept, _ = Checkpointer(tmp_path / "checkpoints").restore(4, {"state": good.state, "best": None})
    assert toy.same(kept["state"].trainable, good.state.trainable)


def test_non_finite_batches_can_be_left_out_up_to_a_limit():
    out = train(skip_nonfinite=2, **poisoned({2, 5}))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out.state.trainable))
    assert [r["step"] for r in out.history if not r["finite"]] == [3, 6]
    with pytest.raises(ModelError, match="step 7"):
        train(skip_nonfinite=2, **poisoned({2, 5, 6}))


def test_seeds_are_reported_apart_and_keep_their_own_best(tmp_path):
    setups = [toy.setup(i) for i in range(3)]
    frozen, stepper = setups[0][1], jax.jit(step.over_seeds(setups[0][2]), donate_argnums=(0,))
    evaluate = step.make_eval(toy.loss, seeds=True)

    def run(steps, folder):
        stacked = state.stack([s for s, _, _ in setups])
        return fit(
            stepper,
            stacked,
            frozen,
            lambda k: jax.tree.map(lambda *x: np.stack(x), *[toy.batch(k, seed=i) for i in range(3)]),
            steps=steps,
            evaluate=lambda s, stop: evaluate(s, frozen, [toy.rows(9)], stop),
            eval_every=1,
            checkpointer=Checkpointer(folder),
            best_metric="near",
        )

    out = run(6, tmp_path / "a")
    first = out.history[0]
    assert len(first["loss/seeds"]) == 3 and first["loss"] == pytest.approx(np.mean(first["loss/seeds"]))
    near = np.array([r["eval/near/seeds"] for r in out.history if "eval/near" in r])
    np.testing.assert_allclose(out.best["value"], near.max(0), rtol=1e-6)
    assert out.best["step"].tolist() == (near.argmax(0) + 1).tolist()
    run(3, tmp_path / "b")
    assert toy.same(run(6, tmp_path / "b").best, out.best)


SCRIPT = """
import sys, time
from pathlib import Path
from tests.train import test_loop, toy

folder, slow = Path(sys.argv[1]), sys.argv[2]
def batch(k):
    if slow == "train" and k == 3:
        print("ready", flush=True)
        time.sleep(1)
    return test_loop.data(k)
rows = toy.rows
def slow_rows(k):
    if slow == "eval":
        print("ready", flush=True)
        time.sleep(1)
    return rows(k)
toy.rows = slow_rows
test_loop.train(folder, batch=batch, save_every=100)
"""


def start(folder, slow):
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), slow],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.parametrize("slow, at", [("train", (3, 4)), pytest.param("eval", (4,), marks=pytest.mark.slow)])
def test_sigterm_saves_and_exits_and_the_run_goes_on(tmp_path, slow, at):
    process = start(tmp_path, slow)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in err
    assert "stopped by SIGTERM" in err and "saved in" in err
    assert Checkpointer(tmp_path / "checkpoints").latest_step() in at
    resumed, whole = train(tmp_path), train()
    assert toy.same(resumed.state, whole.state) and toy.same(resumed.best, whole.best)
    assert resumed.history == whole.history


def test_second_ctrl_c_exits_at_once(tmp_path):
    process = start(tmp_path, "train")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130) and time.monotonic() - began < 2


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(steps=1, evaluating=False)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_is_an_exit_even_without_a_checkpointer(number, status):
    def stopping(k):
        if k == 2:
            os.kill(os.getpid(), number)
        return data(k)

    with pytest.raises(Interrupted) as error:
        train(batch=stopping, evaluating=False)
    assert error.value.code == status
