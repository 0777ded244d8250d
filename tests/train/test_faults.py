"""Faults F1-F23, as a table: what is done to a run, and what must come of it.

| fault | what is done | where it is tested |
|---|---|---|
| F1 | SIGKILL at named points (at random ones: experiments/kill_test.py) | test_killed_anywhere_... |
| F2 | SIGTERM in training, in evaluation, in a save; in compilation | here and test_loop |
| F3 | SIGINT once, twice | test_loop |
| F4 | SIGKILL while resuming | test_killed_anywhere_... [restore, metrics_resume] |
| F5 | five kills in a row | test_five_kills_in_a_row |
| F6 | disk full in a save, waited for and not | here and test_checkpoint |
| F7 | disk full in metrics, plot, export | test_metrics, tests/peft/test_adapter |
| F8 | a folder that cannot be written | test_lock |
| F9, F10 | a flipped bit anywhere | test_checkpoint; experiments/kill_test.py |
| F11, F14 | a file of the newest step deleted, emptied, halved | test_checkpoint |
| F12 | all steps damaged | test_checkpoint |
| F13 | other things among the steps | test_what_is_no_step_is_left_alone |
| F15 | NaN in data, in a leaf, in the loss, in gradients alone | here and test_loop |
| F16 | more bad batches than allowed | test_loop |
| F17 | the data raise (there are no workers that could hang) | test_data_that_raise_... |
| F18 | resume anywhere in an epoch | test_a_resumed_run_sees_the_same_rows |
| F19 | resume on other meshes, other numbers of processes | here and test_distributed |
| F20 | resume with other settings | here, test_loop, test_checkpoint |
| F21 | two processes on a folder | test_lock |
| F22 | the clock jumps back | test_the_clock_does_not_choose_the_step |
| F23 | a process of several is killed | test_distributed |
| F25 | a tracker raises or hangs | test_observe |
| F27 | many saves | test_many_saves_leave_nothing_open |
"""

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kill_test
from research.data.batches import Batches
from research.errors import ModelError
from research.tasks.loss import Loss
from research.train import checkpoint, integrity, loop, metrics
from research.train import mesh as meshes
from research.train.checkpoint import Checkpointer
from tests.train import toy

SECOND = 2  # the save, evaluation or resume in which a point is reached


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def nth(call, number=SECOND, then=None):
    """`call`, but for its n-th use, which dies first (or does `then`, and dies)."""
    used = 0

    def wrapped(*args, **kwargs):
        nonlocal used
        used += 1
        if used == number:
            (then or die)(*args, **kwargs)
            die()
        return call(*args, **kwargs)

    return wrapped


def point(name: str) -> kill_test.Hook:
    """Arranges that this process dies at a named point; returns the hook for `kill_test.run`."""
    rename, sync, remove, orbax = Path.rename, integrity.sync_folder, checkpoint.shutil.rmtree, checkpoint._orbax
    seal, write, replace = integrity.seal, os.write, os.replace
    saves = 0

    def half_sealed(folder, record):
        seal(folder, record)
        text = (folder / integrity.NAME).read_bytes()
        (folder / integrity.NAME).write_bytes(text[: len(text) // 2])

    def arrays(action, path, leaves):
        """Dies as soon as the second save has bytes on the disk."""
        nonlocal saves
        saves += action == "save"
        if saves == SECOND:
            files = lambda: [f for f in list(path.parent.rglob("*")) if f.is_file()]  # noqa: E731

            def watch():
                while not any(f.exists() and f.stat().st_size for f in files()):
                    pass
                die()

            threading.Thread(target=watch, daemon=True).start()
        return orbax(action, path, leaves)

    def removing(folder, **options):
        if Path(folder).name.isdecimal():  # an old step: half of it goes
            next(f for f in Path(folder).rglob("*") if f.is_file()).unlink()
            die()
        remove(folder, **options)

    def renamed(folder):
        if (folder / "4").exists():
            die()
        sync(folder)

    if name == "before_save":
        Checkpointer._write = nth(Checkpointer._write)
    elif name == "after_making_the_folder":
        checkpoint._orbax = nth(orbax)
    elif name == "amid_the_arrays":
        checkpoint._orbax = arrays
    elif name == "before_sealing":
        integrity.seal = nth(seal)
    elif name == "half_sealed":
        integrity.seal = nth(seal, then=half_sealed)
    elif name == "before_renaming":
        Path.rename = nth(rename)
    elif name == "after_renaming":
        integrity.sync_folder = renamed
    elif name == "deleting_the_oldest":
        checkpoint.shutil.rmtree = removing
    elif name == "half_a_row":
        metrics.os.write = nth(write, 7, then=lambda handle, line: write(handle, line[: len(line) // 2]))
    elif name == "restore":
        checkpoint._orbax = nth(orbax, 1)
    elif name == "metrics_resume":
        os.replace = nth(replace, 1)
    else:
        kind, at = name.rsplit("_", 1)
        seen = 0

        def hook(where: str, _: int) -> None:
            nonlocal seen
            seen += where == kind
            if seen == int(at):
                die()

        return hook
    return lambda *_: None


def child(folder: Path, name: str) -> None:
    kill_test.quiet()
    kill_test.run(folder, point(name))


def killed(folder: Path, name: str) -> None:
    process = kill_test.processes().Process(target=child, args=(folder, name))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """All bits of a run that nothing happened to."""
    return kill_test.run(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["before_save", "after_making_the_folder", "amid_the_arrays", "before_sealing", "half_sealed", "before_renaming",
     "after_renaming", "deleting_the_oldest", "half_a_row", "batch_8", "step_7", "eval_2", "restore", "metrics_resume"],
)  # fmt: skip
def test_killed_anywhere_a_run_ends_with_the_same_bits(whole, tmp_path, name):
    if name in ("restore", "metrics_resume"):
        killed(tmp_path, "batch_8")
    killed(tmp_path, name)
    assert kill_test.run(tmp_path) == whole
    assert not list((tmp_path / "checkpoints").glob(".*")), "what the killed save left is cleared away"
    steps = [int(f.name) for f in (tmp_path / "checkpoints").iterdir()]
    assert sorted(steps) == [8, 10, 12]


@pytest.mark.slow
def test_five_kills_in_a_row(whole, tmp_path):
    for name in ("amid_the_arrays", "half_a_row", "restore", "step_3", "before_renaming"):
        killed(tmp_path, name)
    assert kill_test.run(tmp_path) == whole


@pytest.mark.slow
def test_a_kill_loses_no_more_than_one_save_interval(whole, tmp_path):
    """Beyond the steps since the last save: a save is whole before the next begins. `save_every` is 2."""
    behind = []

    def hook(where, k):
        if where == "batch" and k > 4:
            steps = [int(f.name) for f in (tmp_path / "checkpoints").iterdir() if f.name.isdecimal()]
            behind.append(k - max(steps))

    assert kill_test.run(tmp_path, hook) == whole
    assert behind and max(behind) <= 4


# -------------------------------------------------------------------- a save beside the next steps


def slow_write(monkeypatch, saver, gate):
    write = saver._write
    monkeypatch.setattr(saver, "_write", lambda *args: (gate.wait(20), write(*args)))


def test_a_save_under_way_keeps_the_bits_it_was_given(tmp_path, monkeypatch):
    """The donated buffers are written over by three steps before a byte is on the disk."""
    s, frozen, stepper = toy.setup()
    stepper, saver, gate = jax.jit(stepper, donate_argnums=(0,)), Checkpointer(tmp_path), threading.Event()
    slow_write(monkeypatch, saver, gate)
    s, _ = stepper(s, frozen, toy.batch(0))
    kept = jax.tree.map(jnp.copy, s)
    saver.save(1, s, {}, wait=False)
    for k in range(1, 4):
        s, _ = stepper(s, frozen, toy.batch(k))
    assert not (tmp_path / "1").exists()
    gate.set()
    assert saver.latest_step() == 1
    back, _ = saver.restore(1, kept)
    assert toy.same(back, kept) and not toy.same(back, s)


@pytest.mark.slow
def test_one_save_is_in_flight_and_the_last_is_waited_for(tmp_path, monkeypatch):
    running, most, write = 0, 0, Checkpointer._write

    def counted(self, *args):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        write(self, *args)
        running -= 1

    monkeypatch.setattr(Checkpointer, "_write", counted)
    kill_test.run(tmp_path, save_every=1, steps=5)
    assert most == 1 and running == 0 and integrity.fault(tmp_path / "checkpoints" / "5", 5) is None


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_failed_save_is_tried_once_more_then_it_stops_the_run_at_the_next_step(tmp_path, monkeypatch, times, capsys):
    real, calls = checkpoint._orbax, []

    def full(action, path, leaves):
        if action == "save" and path.parent.name == ".saving-4":
            calls.append(path)
            if len(calls) <= times:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(action, path, leaves)

    monkeypatch.setattr(checkpoint, "_orbax", full)
    asked = []

    def hook(where, k):
        asked.append(k)
        if where == "step" and len(calls) == 2:
            time.sleep(0.1)

    saver = Checkpointer(tmp_path / "checkpoints")
    if times == 1:
        kill_test.run(tmp_path, hook, steps=6)
        assert saver.latest_step() == 6 and len(calls) == 2
    else:
        with pytest.raises(ModelError, match=r"cannot save step 4 in .*No space left.*bytes free; earlier steps"):
            kill_test.run(tmp_path, hook, steps=12)
        assert saver.latest_step() == 2 and max(asked) < 11
    assert "trying once more" in capsys.readouterr().err


def test_a_signal_during_a_save_waits_for_it(tmp_path, monkeypatch):
    write = Checkpointer._write

    def signalling(self, record, leaves):
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        write(self, record, leaves)

    monkeypatch.setattr(Checkpointer, "_write", signalling)
    with pytest.raises(loop.Interrupted) as error:
        kill_test.run(tmp_path)
    newest = Checkpointer(tmp_path / "checkpoints").latest_step()
    assert error.value.code == 143 and newest in (4, 5, 6)


def test_the_best_are_kept_beside_the_newest(tmp_path):
    saver, scores = Checkpointer(tmp_path, keep=2, keep_best=1), [0.1, 0.9, 0.3, 0.2, None, 0.4]
    for k, score in enumerate(scores, 1):
        saver.save(k, {"x": jnp.full(3, k)}, {}, score=score)
    assert sorted(os.listdir(tmp_path)) == ["2", "5", "6"]
    assert saver.best_step() == 2 and saver.latest_step() == 6
    assert float(saver.restore(2, {"x": jnp.zeros(3, int)})[0]["x"][0]) == 2
    saver.save(7, {"x": jnp.full(3, 7)}, {}, score=0.95)
    assert sorted(os.listdir(tmp_path)) == ["6", "7"] and saver.best_step() == 7


@pytest.mark.slow
def test_the_loop_scores_a_step_by_its_evaluation(tmp_path):
    kill_test.run(tmp_path, save_every=3)
    rows = {r["step"]: r["eval/loss"] for r in metrics.read(tmp_path / "metrics.jsonl") if "eval/loss" in r}
    saver = Checkpointer(tmp_path / "checkpoints")
    kept = [int(f.name) for f in saver.directory.iterdir()]
    assert sorted(kept) == [6, 9, 12] and saver.best_step() == min(kept, key=rows.get)


# -------------------------------------------------------------------- checkpoints


def test_what_is_no_step_is_left_alone(tmp_path, capsys):
    saver = Checkpointer(tmp_path)
    saver.save(3, {"x": jnp.ones(2)}, {})
    for name in ("0005", "5.0", "-1", "1e3", "notes", "٧"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "9").mkdir()
    (tmp_path / "7").write_text("")
    (tmp_path / "8").symlink_to(tmp_path / "8")
    assert saver.latest_step() == 3 and capsys.readouterr().err == ""
    saver.save(4, {"x": jnp.ones(2)}, {})
    assert {"notes", "0005", "7", "9"} <= set(os.listdir(tmp_path))


def test_the_clock_does_not_choose_the_step(tmp_path):
    saver = Checkpointer(tmp_path)
    for k in (1, 2):
        saver.save(k, {"x": jnp.ones(2)}, {})
    for f in [tmp_path / "2", *(tmp_path / "2").rglob("*")]:
        os.utime(f, (0, 0))
    assert saver.latest_step() == 2


@pytest.mark.slow
def test_many_saves_leave_nothing_open(tmp_path):
    saver, opened = Checkpointer(tmp_path, keep=3), []
    for k in range(1, 9):
        saver.save(k, {"x": jnp.ones(2)}, {}, wait=False)
        saver.wait()
        opened.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert opened[-1][0] <= opened[3][0] + 1 and opened[-1][1] <= opened[3][1] + 1
    assert sorted(os.listdir(tmp_path)) == ["6", "7", "8"]


@pytest.mark.parametrize("change, words", [("dtype", "bfloat16"), ("rank", r"float32\[8, 2\]"), ("extra", "missing")])
def test_another_dtype_rank_or_structure_is_refused(tmp_path, change, words):
    saver, x = Checkpointer(tmp_path), {"a": jnp.ones((8, 2))}
    saver.save(1, x, {})
    other = {
        "dtype": {"a": x["a"].astype(jnp.bfloat16)},
        "rank": {"a": jnp.ones((8, 4))},
        "extra": x | {"b": jnp.ones(1)},
    }
    with pytest.raises(ModelError, match=words):
        saver.restore(1, other[change])


@pytest.mark.slow
def test_a_run_goes_on_over_8_then_4_then_1_devices_and_back(tmp_path):
    mesh = lambda spec, devices: meshes.make_mesh(spec, jax.devices()[:devices])  # noqa: E731
    whole = toy.fit(tmp_path / "whole", mesh("data:1", 1), 12)
    for spec, devices, steps in (("data:2,fsdp:4", 8, 3), ("fsdp:4", 4, 6), ("data:1", 1, 9), ("data:8", 8, 12)):
        part = toy.fit(tmp_path / "part", mesh(spec, devices), steps)
        assert part.state.trainable["peft"]["w"]["a"].sharding.mesh == mesh(spec, devices)
    losses = [[r["loss"] for r in result.history] for result in (whole, part)]
    assert len(losses[1]) == 12 and losses[1][0] != losses[1][-1]
    np.testing.assert_allclose(*losses, rtol=1e-5)


# -------------------------------------------------------------------- data and numbers


def counting(state, frozen, feed):
    """A step that only counts."""
    done = {"loss": jnp.float32(0.5), "weight": jnp.float32(1), "finite": jnp.asarray(True)}
    return state.replace(step=state.step + 1), done


@pytest.mark.parametrize("shuffle", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_sees_the_same_rows(tmp_path, shuffle):
    """25 rows in batches of 4 by 2 micro-batches: epochs end inside batches 6, 12. Stopped in and between epochs."""
    rows, seen = {"id": np.arange(25)}, []
    make = lambda: Batches(rows, 4, seed=1, micro_batches=2, shuffle=shuffle)  # noqa: E731
    for stop in (3, 6, 7, 12, 14):
        data = make()  # a new process has nothing of the old one
        batch = lambda k, data=data: (seen.append(data.batch(k)["id"].ravel().tolist()), data.batch(k))[1]  # noqa: E731
        s = toy.setup()[0]
        out = loop.fit(counting, s, None, batch, steps=stop, checkpointer=Checkpointer(tmp_path))
        assert int(out.state.step) == stop
    assert seen == [make().batch(k)["id"].ravel().tolist() for k in range(14)]
    assert sorted(sum(seen, [])[:25]) == list(range(25)) and (seen[0] == [0, 1, 2, 3]) == (not shuffle)


def test_data_that_raise_name_their_step_and_lose_no_save(tmp_path, monkeypatch):
    def broken(where, k):
        if where == "batch" and k == 5:
            raise OSError("the row is gone")

    with pytest.raises(OSError, match="the row is gone") as error:
        kill_test.run(tmp_path, broken)
    assert any("step 6" in note for note in error.value.__notes__)
    assert Checkpointer(tmp_path / "checkpoints").latest_step() == 4


def broken_loss(v, batch, rng):
    """Gradients that are not numbers, of a loss that is one."""
    out = toy.loss(v, batch, rng)
    bad = batch["bad"].sum() > 0
    root = jnp.sqrt(jnp.where(bad, 0.0 * v["peft"]["w"]["a"], 1.0))  # of slope infinity at 0
    return Loss(out.sum + jnp.where(bad, root.sum(), 0.0), out.weight, out.metrics)


BROKEN = jax.jit(toy.setup(loss=broken_loss)[2], donate_argnums=(0,))


@pytest.mark.parametrize(
    "where, words", [("data", "batch/x"), ("leaf", "peft/w/scale"), ("gradients", "grad_norm nan"), ("none", "")]
)
def test_what_is_not_finite_is_named_and_its_batch_is_kept(tmp_path, where, words):
    def batch(k):
        rows = toy.batch(k, micro=2)
        rows["bad"] = np.full(rows["y"].shape, float(where == "gradients" and k == 2), np.float32)
        if where == "data" and k == 2:
            rows["x"][1, 3, 2] = np.inf
        return rows

    s, frozen, _ = toy.setup()
    if where == "leaf":
        s = s.replace(extra=s.extra | {"peft": {"w": s.extra["peft"]["w"] | {"scale": jnp.asarray(jnp.nan)}}})
    options = {"checkpointer": Checkpointer(tmp_path / "c"), "save_every": 2, "steps": 4}
    run = lambda: loop.fit(BROKEN, s, frozen, batch, writer=metrics.Writer(tmp_path / "m"), **options)  # noqa: E731
    if where == "none":
        assert run().history[-1]["finite"] and not list(tmp_path.glob("*.npz"))
        return
    with pytest.raises(ModelError) as error:
        run()
    step = 1 if where == "leaf" else 3
    saved = tmp_path / f"nonfinite-{step}.npz"
    assert words in str(error.value) and f"its batch is in {saved}" in str(error.value) and "\n" not in str(error.value)
    with np.load(saved) as kept:
        assert all(np.array_equal(kept[name], x, equal_nan=True) for name, x in batch(step - 1).items())
    assert Checkpointer(tmp_path / "c").latest_step() == (None if where == "leaf" else 2)


def test_a_batch_that_cannot_be_kept_does_not_hide_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    s, frozen, _ = toy.setup()
    batch = lambda k: toy.batch(k) | {"bad": np.ones((1, 16), np.float32)}  # noqa: E731
    with pytest.raises(ModelError, match="step 1 is not finite.*its batch is lost: .*No space left"):
        loop.fit(BROKEN, s, frozen, batch, steps=2, writer=metrics.Writer(tmp_path / "m"))


# -------------------------------------------------------------------- the script


@pytest.mark.slow
def test_random_kills_and_flipped_bits(tmp_path):
    """experiments.kill_test, in small."""
    found = kill_test.kills(tmp_path, 4, random.Random(1))
    assert found["kills"] == 4 and found["equal"] == found["runs"] >= 1
    flips = kill_test.flips(tmp_path / "whole" / "checkpoints", 40, random.Random(1))
    assert flips == {"flips": 40, "found": 40}
