"""The one error class of the data tools, and the way a command line shows it."""

import sys
from collections.abc import Callable

from megatron_smlp.errors import UserError


class DataError(UserError):
    """Something about data or its tokenizer that the user can put right."""


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and exit: 0 if it returns None, 1 with one line on a user's error.

    A broken pipe (`tool | head`) is no error; an interrupt exits 130, as a shell expects.
    """
    try:
        code = main()
    except (DataError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            code = _silence_stdout()
        else:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _silence_stdout() -> int:
    # The interpreter flushes stdout once more at exit, which would raise again.
    sys.stdout = open("/dev/null", "w")  # noqa: SIM115, PTH123
    return 0


def require_package(name: str, *, purpose: str, extra: str) -> None:
    """Raise `DataError` with the way to install `name` where it cannot be imported."""
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise DataError(f"{purpose} needs the Python package {name!r}: pip install {extra}")
