"""Errors that are the user's to mend: one line that says what was wrong and names the nearest valid choice.

A script prints the line without a traceback and exits with the error's status; anything else that is raised is our bug
and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of all errors a user can mend. `exit_status` is what a script exits with."""

    exit_status = 1


class FlagError(UserError):
    """A flag, method specification or option has a wrong name or value."""

    exit_status = 2


class DataError(UserError):
    """A data file or data set is missing, broken or of the wrong form."""

    exit_status = 3


class ModelError(UserError):
    """A model, adapter or checkpoint is missing, broken or does not fit."""

    exit_status = 4


def did_you_mean(name: str, choices: Iterable[str], most: int = 12) -> str:
    """Returns " Did you mean 'x'?" for the nearest choice, else " Valid: a, b, c." (at most `most` of them)."""
    choices = sorted(set(choices))
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    shown = ", ".join(choices[:most]) + (", ..." if len(choices) > most else "")
    return f" Valid: {shown}." if choices else ""
