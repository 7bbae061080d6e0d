"""Errors for the user: one line that names the thing, its value, what is allowed, what to do.

program.py prints them. Which processes print it is said by `speaker`.
"""

from __future__ import annotations

from importlib.util import find_spec


class UserError(ValueError):
    """Its text is shown as it is, without a traceback; the process ends with `exit_code`."""

    exit_code = 1
    speaker = "RANK"
    """The variable that is 0 in a process that speaks for the others. Here they raise it together;
    with LOCAL_RANK one machine may be alone, with an empty name one process."""


class UsageError(UserError):
    """A flag, a file or a combination of them is wrong."""

    exit_code = 2
    speaker = "LOCAL_RANK"  # of one machine, as a driver or a data mount may be


class UnlikeRanksError(UsageError):
    """A rank has other flags, data or packages than the first; it may be the only one."""

    speaker = ""


class NonFiniteLossError(UserError):
    """A loss or the gradient norm was NaN or infinite, and the run was told to stop at one."""

    exit_code = 3


class AccountingError(UserError):
    """The accounting counts another model than the one that was built."""


class CheckpointError(UserError):
    """A checkpoint cannot be loaded or saved. Any rank may be the only one that sees it."""

    speaker = ""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written."""


class SaveError(UserError):
    """A checkpoint could not be saved; all ranks have agreed on that."""


class TakenOverError(UserError):
    """Another run writes into the folder of this one; any rank may be the only one that sees it."""

    speaker = ""


class NoGoodCheckpointError(UserError):
    """No checkpoint that may be loaded is intact; all ranks have agreed on that."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint would run code while it is loaded."""


class FileError(UserError):
    """A file of the user's; any rank may be the only one that sees it."""

    speaker = ""


class DataError(UserError):
    """Something about data or its tokenizer that the user can put right."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # a library's reason may have several lines


def require_package(name: str, *, purpose: str, extra: str) -> None:
    """Check that an optional package can be imported.

    Raises:
        UsageError: with the way to install it.
    """
    if find_spec(name) is None:
        raise UsageError(f"{purpose} needs the Python package {name!r}: pip install {extra}")
