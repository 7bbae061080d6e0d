"""Flags: how they are spelt, and the parser of every tool's."""

import argparse
from typing import Any

from megatron_smlp import __version__
from megatron_smlp.errors import UsageError

VERSION = f"megatron_smlp {__version__}"


def flag_of(name: str) -> str:
    """`--num-layers` of `num_layers`."""
    return "--" + name.replace("_", "-")


class _WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default, unless the help does so or there is none to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_said = "default" in (action.help or "") or not action.option_strings
        if is_said or action.default in (None, False, [], argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Wrong flags end like every other error of the tools: in one line, with 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _WithDefaults)
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=VERSION, help="print it")

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}. `--help` lists every flag.")
