"""SIGTERM and Ctrl-C as a flag that long loops read between two units of work."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(SystemExit):
    """Raised after a signal, when all is saved. Uncaught, the process exits with 130 (Ctrl-C) or 143 (SIGTERM)."""


@contextmanager
def catch() -> Iterator[Callable[[], bool]]:
    """Yields `stopped()`, true once SIGINT or SIGTERM came (`stopped.number`). Outside the main thread it stays false.

    A second SIGINT kills at once, whatever the process is doing.
    """

    def stopped() -> bool:
        return stopped.number != 0

    stopped.number = 0

    def handler(number: int, _: Any) -> None:
        stopped.number = stopped.number or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, old in before.items():
            signal.signal(number, old)
