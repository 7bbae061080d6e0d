"""Look up flags in Megatron's parser: those it has, those given, and the nearest to a typo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_smlp.command_line import did_you_mean
from megatron_smlp.flags.megatron_flags import usable


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the parser's actions by flag, such as `--num-layers`."""
    return parser._option_string_actions


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> frozenset[str]:
    """Return the destinations of the flags that a command line names."""
    actions = actions_of(parser)
    flags = (word.split("=")[0] for word in argv)
    return frozenset(actions[flag].dest for flag in flags if flag in actions)


def nearest(parser: argparse.ArgumentParser, name: str) -> str:
    """Suggest usable flags that an unknown flag or key may have meant, or else where all are."""
    names = usable(parser)
    known = (flag for flag, action in actions_of(parser).items() if action.dest in names)
    flag = "--" + name.lstrip("-").replace("_", "-")
    hint = did_you_mean(flag, known, most=3, cutoff=0.7)
    return hint or "docs/flags.md lists every flag."
