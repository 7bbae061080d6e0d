"""Flags: their spelling, suggestions for misspelled names, and the parser of all tools."""

import argparse
import difflib
import sys
from collections.abc import Iterable
from typing import Any

from megatron_smlp import __version__
from megatron_smlp.errors import UsageError

VERSION = f"megatron_smlp {__version__}"
SPELLINGS = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "layernorm_epsilon": "--norm-epsilon",
    "fp8": "--fp8-format",
}
"""Flags whose name differs from what they set."""


def flag_of(name: str) -> str:
    """Return `--num-layers` for `num_layers`."""
    return SPELLINGS.get(name) or "--" + name.replace("_", "-")


def word_of(value: Any) -> str:
    """Return a value as one word of an argv: a list without the spaces that would split it."""
    return str(value).replace(" ", "") if isinstance(value, list | tuple) else str(value)


def negation_of(flag: str) -> str:
    """Return `--no-save` for `--save`."""
    return flag.replace("--", "--no-", 1)


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """Return `did you mean A or B?` with at most `most` known names; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(close)}?" if close else ""


def note_ignored(flag: str, why: str) -> None:
    """Print that a flag of Megatron's tools, which affects no result there either, is ignored."""
    print(f"note: {flag} is accepted and ignored: {why}", file=sys.stderr)


def require_positive(options: object, *names: str) -> None:
    """Check that given numbers are at least 1.

    Raises:
        UsageError: one is not; names the flag and its value.
    """
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"{flag_of(name)} {value}: give 1 or more")


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to a flag's help, unless the help names it or it is trivial."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_said = "default" in (action.help or "") or not action.option_strings
        if is_said or action.default in (None, False, [], argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parser that reports wrong flags like other errors of the tools: in one line, exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", WithDefaults)
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=VERSION, help="print it")

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}. `--help` lists every flag.")
