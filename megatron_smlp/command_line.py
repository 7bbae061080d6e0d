"""Flags: how they are spelt, what a misspelt name may have meant, and the parser of all tools."""

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
"""Flags that set something of another name."""


def flag_of(name: str) -> str:
    """`--num-layers` of `num_layers`."""
    return SPELLINGS.get(name) or "--" + name.replace("_", "-")


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """Return `did you mean A or B?` with at most `most` known names; "" where none is close."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(close)}?" if close else ""


def note_ignored(flag: str, why: str) -> None:
    """Tell of a flag of Megatron's tools that would change no result there either."""
    print(f"note: {flag} is accepted and ignored: {why}", file=sys.stderr)


def require_positive(options: object, *names: str) -> None:
    """Refuse numbers under 1 that were given.

    Raises:
        UsageError: with the flag and its value.
    """
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"{flag_of(name)} {value}: give 1 or more")


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default, unless the help does so or there is none to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_said = "default" in (action.help or "") or not action.option_strings
        if is_said or action.default in (None, False, [], argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Wrong flags end like every other error of the tools: in one line, with 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", WithDefaults)
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=VERSION, help="print it")

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}. `--help` lists every flag.")
