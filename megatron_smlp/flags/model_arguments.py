"""Turn model.json into command-line arguments, for programs that start from its model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_smlp.command_line import negation_of, word_of
from megatron_smlp.flag_facts import MEGATRON_FLAGS, Facts
from megatron_smlp.flags.megatron_flags import ALLOW, usable
from megatron_smlp.options import MODEL_FLAGS


def model_arguments(
    parser: argparse.ArgumentParser, flags: Mapping[str, Any], *, trains: bool = False
) -> list[str]:
    """Return the flags that define the model.

    Args:
        trains: include flags that only training reads, such as loss coefficients.
    """
    arguments: list[str] = []
    tested = usable(parser)
    for name, value in flags.items():
        facts = MODEL_FLAGS.get(name, Facts())
        is_model = not facts.derived and (trains or facts.evaluates or not facts.may_change)
        if name in MEGATRON_FLAGS and facts.token_routers:
            # Other rules set it themselves.
            is_model &= flags.get("token_router") in facts.token_routers
        if is_model and value is not None:
            actions = [action for action in parser._actions if action.dest == name]
            given = [*_arguments_of(actions, value, always=facts.filled_in)]
            if given and name not in tested:
                arguments += [ALLOW, name]  # as its training did
            arguments += given
    return arguments


def _arguments_of(actions: Sequence[argparse.Action], value: Any, *, always: bool) -> Iterator[str]:
    for action in actions:
        option = action.option_strings[0]
        if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
            if action.const == value and action.default != value:
                yield option
        elif isinstance(action, argparse.BooleanOptionalAction):
            yield option if value else negation_of(option)
        elif always or value != action.default:
            yield f"{option}={word_of(value)}"
