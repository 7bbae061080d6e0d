"""Errors for the user: one line that names the thing, its value, what is allowed, what to do.

program.py prints them; `speaker` determines which processes do.
"""

from __future__ import annotations

from importlib.util import find_spec


class UserError(ValueError):
    """Shown to the user as it is, without a traceback; the process exits with `exit_code`."""

    exit_code = 1
    speaker = "RANK"
    """The environment variable that is 0 in processes that print the error. RANK: all ranks raise
    it; LOCAL_RANK: perhaps those of one machine only; empty: perhaps one process only."""


class UsageError(UserError):
    """A flag, a file or a combination of them is wrong."""

    exit_code = 2
    speaker = "LOCAL_RANK"  # a driver or a data mount may be wrong on one machine only


class UnlikeRanksError(UsageError):
    """A rank's flags, data, code or packages differ from rank 0's; it may be the only such rank."""

    speaker = ""


class NonFiniteLossError(UserError):
    """A loss or the gradient norm was NaN or infinite, and --nonfinite-loss is stop."""

    exit_code = 3


class AccountingError(UserError):
    """The accounting does not describe the model that was built."""


class CheckpointError(UserError):
    """A checkpoint cannot be loaded or saved; any rank may be the only one that notices."""

    speaker = ""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing or differs from what was written."""


class SaveError(UserError):
    """A checkpoint could not be saved; all ranks have agreed on that."""


class TakenOverError(UserError):
    """Another run has taken over this run's folder; any rank may be the only one that notices."""

    speaker = ""


class NoGoodCheckpointError(UserError):
    """None of the checkpoints that may be loaded is intact; all ranks have agreed on that."""


class UnsafeCheckpointError(CheckpointError):
    """Loading a checkpoint would execute code from it."""


class FileError(UserError):
    """A file of the user's cannot be used; any rank may be the only one that notices."""

    speaker = ""


class ServiceError(UserError):
    """A service such as W&B refuses; the one rank that talks to it is the only one that notices."""

    speaker = ""


class DataError(UserError):
    """A problem with data or its tokenizer that the user can fix."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # a library's message may have several lines


def require_package(name: str, *, purpose: str, extra: str) -> None:
    """Check that an optional package is installed.

    Raises:
        UsageError: it is not; says how to install it.
    """
    if find_spec(name) is None:
        raise UsageError(f"{purpose} needs the Python package {name!r}: pip install {extra}")
