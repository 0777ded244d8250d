import struct
import sys
import threading
import time
import types

import numpy as np
import pytest

from research.errors import FlagError
from research.train import metrics, observe
from tests.train import toy
from tests.train.test_loop import train

# What tensorboard 2.21's own RecordWriter makes of these three events, all of wall time 1.5.
GOLDEN = (
    "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c100000000000000095fbfe1809000000000000"
    "f83f10ac023a020801713b788a31000000000000009d8383e909000000000000f83f10ac022a230a0b0a046c6f7373150000803e0a140a0d6576616c"
    "2f6163637572616379150000003f3a080754"
)


def test_events_are_tensorboards_own_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.5)
    board = observe.TensorBoard(tmp_path)
    board.resume(299)
    board.write({"step": 300, "loss": 0.25, "eval/accuracy": 0.5, "loss/seeds": [0.2, 0.3]})
    board.close()
    assert board.path.read_bytes().hex() == GOLDEN


def test_crc_is_castagnolis():
    crc = 0xE3069283  # of "123456789", the check value of its definition
    assert observe._checksum(b"123456789") == struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


class Faulty:
    """A sink that fails at one of its calls."""

    def __init__(self, at, how):
        self.at, self.how, self.rows = at, how, []
        self._call("init")

    def _call(self, name):
        if name == self.at:
            self.how()

    def resume(self, step):
        self._call("resume")

    def write(self, row):
        self._call("write")
        self.rows.append(row)

    def close(self):
        self._call("close")


def fail():
    raise SystemExit("the tracker's server\nis away")


@pytest.mark.parametrize("at", ["init", "resume", "write", "close"])
def test_a_tracker_that_fails_costs_one_line_and_no_row(tmp_path, at, capsys):
    tracker = observe.Tracker("faulty", lambda: Faulty(at, fail))
    writer = metrics.Writer(tmp_path / "m", [tracker])
    writer.resume(0)
    for k in range(1, 30):
        writer.write({"step": k, "loss": 0.5})
    tracker.close()
    assert [r["step"] for r in metrics.read(tmp_path / "m")] == list(range(1, 30))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "faulty gets no more rows: SystemExit: the tracker's server is away" in err


@pytest.mark.parametrize("at", ["init", "write", "close"])
def test_a_tracker_that_hangs_holds_up_nothing(tmp_path, at, capsys):
    gate = threading.Event()
    tracker = observe.Tracker("slow", lambda: Faulty(at, lambda: gate.wait(60)), room=5)
    began = time.monotonic()
    for k in range(1, 30):
        tracker.write({"step": k, "loss": 0.5})
        if at == "close":
            time.sleep(0.002)
    tracker.close(seconds=0.1)
    assert time.monotonic() - began < 1
    assert capsys.readouterr().err.count("slow gets no more rows") == 1
    gate.set()


def test_trackers_get_the_rows_of_a_run_and_what_depends_on_the_clock_goes_nowhere_else(tmp_path, monkeypatch):
    sink = Faulty("never", fail)
    tracker = observe.Tracker("sink", lambda: sink)
    writer = metrics.Writer(tmp_path / "m.jsonl", [tracker])
    watch = observe.Watch(flops=2e9, peak=1e12, track=writer.track)
    out = train(steps=3, evaluating=False, writer=writer, watch=watch)
    tracker.close()
    assert [r for r in sink.rows if "loss" in r] == out.history == metrics.read(tmp_path / "m.jsonl")
    perf = [r for r in sink.rows if "perf/step_ms" in r]
    assert [r["step"] for r in perf] == [1, 2, 3]
    for r in perf:
        np.testing.assert_allclose(r["perf/utilisation"], 2e9 / (r["perf/step_ms"] / 1000) / 1e12)


def test_utilisation_is_told_only_where_the_peak_is_known(monkeypatch):
    assert observe.Watch(flops=3e12, peak=1e13)(1, 0.5) == "60.0 % of peak"
    assert observe.Watch(flops=3e12)(1, 0.5) == "6.00 TFLOP/s"
    assert observe.Watch()(1, 0.5) == ""
    devices = observe.jax.device_count()
    assert observe.peak() is None and observe.peak(2e12) == devices * 2e12
    monkeypatch.setitem(observe.PEAKS, observe.jax.devices()[0].device_kind, 1e12)
    assert observe.peak() == devices * 1e12


def test_the_asked_steps_are_profiled(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(observe.jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(observe.jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    watch = observe.Watch(profile=2, folder=tmp_path)
    when = []
    for k in range(1, 9):
        watch(k, 0.1)
        when.append(len(calls))
    assert calls == [("start", str(tmp_path)), ("stop",)] and when == [0, 0, 0, 1, 1, 2, 2, 2]
    watch = observe.Watch(profile=9, folder=tmp_path)
    for k in range(5):
        watch(k, 0.1)
    watch.close()  # the run ended before
    watch.close()
    assert len(calls) == 4


def test_wandb_is_refused_where_it_is_not_and_given_scalars_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FlagError, match="wandb is not installed: pip install wandb"):
        observe.check_wandb()
    calls = []
    run = types.SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("end"))
    fake = types.SimpleNamespace(init=lambda **options: (calls.append(options), run)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = observe.Wandb(tmp_path, {"lr": 0.1}, project="p", id="7")
    sink.write({"step": 3, "loss": 0.5, "loss/seeds": [1.0], "finite": True})
    sink.close()
    assert calls == [
        {"dir": str(tmp_path), "config": {"lr": 0.1}, "resume": "allow", "project": "p", "id": "7"},
        (3, {"loss": 0.5, "finite": 1.0}),
        "end",
    ]


@pytest.mark.slow
def test_a_profile_of_a_run_is_a_trace(tmp_path):
    watch = observe.Watch(profile=2, folder=tmp_path / "profile")
    train(steps=8, evaluating=False, watch=watch, batch=lambda k: toy.batch(k, micro=2, drop=True))
    watch.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
