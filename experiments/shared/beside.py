"""Another Python, with torch, that times the same work beside ours."""

import os
import subprocess
from pathlib import Path

from research.errors import FlagError


def threads() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def lines(python: str, script: str, *arguments: str) -> list[str]:
    """What a script of `experiments` prints under --reference_python, with as many threads as we have.

    Raises FlagError with its last words where it fails.
    """
    command = [python, "-m", f"experiments.{script}", *arguments, f"--threads={threads()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    except OSError as error:
        raise FlagError(f"--reference_python={python}: {error.strerror}.") from None
    found = done.stdout.strip().splitlines()
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise FlagError(f"--reference_python={python} did not run {script}: {reason.removeprefix('error: ')}")
    return found
