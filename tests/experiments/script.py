"""Runs an experiment script inside the test's process: a fresh interpreter would spend its seconds on imports."""

import contextlib
import io
import runpy
import sys
from typing import NamedTuple

from absl import flags

import experiments.shared.common  # noqa: F401  (defines absl's own flags, which must stay)


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def run(name: str, *arguments: str, stdin: str | bytes = "") -> Outcome:
    """`python -m experiments.NAME ARGUMENTS`: exit status, stdout and stderr. The flags it defines are taken back."""
    before, argv, source = set(flags.FLAGS), sys.argv, sys.stdin
    out, err, status = io.StringIO(), io.StringIO(), 0
    typed = io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin)
    sys.argv, sys.stdin = [f"experiments/{name}.py", *arguments], io.TextIOWrapper(typed)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module(f"experiments.{name}", run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv, sys.stdin = argv, source
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
    return Outcome(status, out.getvalue(), err.getvalue())


def refused(outcome: Outcome, status: int, *words: str) -> None:
    """Checks that the script ended with one line that holds the words, and the status."""
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.status == status, outcome
    assert len(lines) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in lines[0], lines[0]
