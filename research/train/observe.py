"""Where a run is looked at from outside: TensorBoard's event files, Weights & Biases, a profile, utilisation.

metrics.jsonl is the truth. What goes elsewhere goes through a thread of its own: a tracker that raises, hangs or is too
slow costs one line on stderr and no step.
"""

import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from research.errors import FlagError
from research.train.metrics import Row, say

# bfloat16 FLOP/s of a device as jax counts them, from the makers' tables (dense, without sparsity), by device_kind.
PEAKS = {
    "TPU v3": 61.5e12,  # a core: jax counts two a chip
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class Sink(Protocol):
    """A place for rows. `resume(step)`: rows after `step` are about to be written again."""

    def resume(self, step: int) -> None: ...
    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Feeds a sink, made by `make`, from a thread. What the sink raises is said once and the run goes on without it."""

    def __init__(self, name: str, make: Callable[[], Sink], room: int = 10_000):
        self.name, self.lost = name, False
        self.rows: queue.Queue = queue.Queue(room)
        self.thread = threading.Thread(target=self._run, args=(make,), name=name, daemon=True)
        self.thread.start()

    def resume(self, step: int) -> None:
        self._put("resume", step)

    def write(self, row: Row) -> None:
        self._put("write", row)

    def close(self, seconds: float = 10.0) -> None:
        """Waits for what is not written yet, but not for long."""
        self._put("close")
        self.thread.join(seconds)
        if self.thread.is_alive():
            self._lose("it did not end in time")

    def _put(self, *call: Any) -> None:
        if not self.lost:
            try:
                self.rows.put_nowait(call)
            except queue.Full:
                self._lose("it takes no more rows")

    def _run(self, make: Callable[[], Sink]) -> None:
        try:
            sink, call = make(), ("start",)
            while call[0] != "close" and not self.lost:
                call = self.rows.get()
                getattr(sink, call[0])(*call[1:])
        except BaseException as error:  # a library may well call sys.exit
            self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, reason: str) -> None:
        if self.lost:
            return
        self.lost = True
        say(f"{self.name} gets no more rows: {' '.join(reason.split())[:200]}; metrics.jsonl has them all")


class TensorBoard:
    """Scalars as an event file, which TensorBoard reads: records of a length, its checksum, a message, its checksum.

    The messages are tensorflow/core/util/event.proto's: Event(wall_time=1, step=2, file_version=3, summary=5,
    session_log=7), Summary(value=1), Value(tag=1, simple_value=2).
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(self.path, "ab")  # noqa: SIM115 (for as long as the run)
        self._event(0, _message(3, b"brain.Event:2"))

    def resume(self, step: int) -> None:
        """TensorBoard leaves out, of earlier files, what is at or after the step of a start."""
        self._event(step + 1, _message(7, _number(1, 1)))

    def write(self, row: Row) -> None:
        values = [
            _message(1, _message(1, name.encode()) + b"\x15" + struct.pack("<f", value))
            for name, value in scalars(row).items()
        ]
        self._event(row["step"], _message(5, b"".join(values)))
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def _event(self, step: int, what: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + (_number(2, step) if step else b"") + what
        size = struct.pack("<Q", len(event))
        self.file.write(size + _checksum(size) + event + _checksum(event))


class Wandb:
    """Weights & Biases. FlagError where it is not installed."""

    def __init__(self, folder: Path, config: Mapping[str, Any], **options: Any):
        wandb = _wandb()
        self.run = wandb.init(dir=str(folder), config=dict(config), resume="allow", **options)

    def resume(self, step: int) -> None:
        pass

    def write(self, row: Row) -> None:
        self.run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self.run.finish()


class Watch:
    """What `loop.fit` calls after each step it has timed: profiles some steps, and gives utilisation for the bar.

    Args:
        flops: of a step, on all devices together.
        peak: FLOP/s of all devices together; without one there is no utilisation, but FLOP/s.
        profile: steps to trace into `folder`, after the first `skip` of this process.
        track: takes rows of what depends on the clock, which metrics.jsonl, the same for the same run, does not hold.
    """

    def __init__(
        self,
        flops: float = 0.0,
        peak: float | None = None,
        profile: int = 0,
        folder: Path | None = None,
        skip: int = 3,
        track: Callable[[Row], None] | None = None,
    ):
        self.flops, self.peak, self.track, self.folder = flops, peak, track, folder
        self.first, self.last = (skip, skip + profile) if profile else (-1, -1)
        self.seen, self.tracing = 0, False

    def __call__(self, step: int, seconds: float) -> str:
        """`step` is done, `seconds` the median of the latest. Returns "41.3 % of peak" or "1.20 TFLOP/s" or ""."""
        if self.seen == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True
        elif self.seen == self.last:
            self.close()
        self.seen += 1
        rate = self.flops / seconds
        found = {"perf/step_ms": 1000 * seconds} | ({"perf/tflops": rate / 1e12} if self.flops else {})
        found |= {"perf/utilisation": rate / self.peak} if self.flops and self.peak else {}
        if self.track:
            self.track({"step": step} | found)
        if "perf/utilisation" in found:
            return f"{100 * found['perf/utilisation']:.1f} % of peak"
        return f"{rate / 1e12:.2f} TFLOP/s" if self.flops else ""

    def close(self) -> None:
        """Ends the profile, if one is under way."""
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
            say(f"profile: {self.folder}")


def peak(given: float | None = None) -> float | None:
    """FLOP/s of all devices: `given` a device, else by the table; None where the chip is not in it."""
    each = given or PEAKS.get(jax.devices()[0].device_kind)
    return each and each * jax.device_count()


def check_wandb() -> None:
    """FlagError where it is not installed."""
    _wandb()


def scalars(row: Row) -> dict[str, float]:
    """What of a row is a number to be drawn."""
    return {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise FlagError("wandb is not installed: pip install wandb, or choose tensorboard") from None
    return wandb


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _table() -> list[int]:
    """Of CRC-32C, the Castagnoli polynomial reversed, for a byte at a time."""
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC = _table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
