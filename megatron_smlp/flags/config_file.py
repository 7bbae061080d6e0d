"""`--config FILE.yaml`: turn its keys into flags, which the command line overrides."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from megatron_smlp.command_line import flag_of, negation_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.exclusive import PER_SPLIT, replaced_by
from megatron_smlp.flags.parser_actions import actions_of, given_flags, nearest
from megatron_smlp.flags.use_checkpoint_args import FLAG as GOES_ON
from megatron_smlp.flags.yaml_file import config_paths, read_settings


def expand_config(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Put the flags of `--config FILE.yaml` before those of the command line.

    A key of the file is dropped if the command line has `--no-KEY` or a flag that replaces the key;
    within the file, per-split paths replace `split`. `--no-KEY` is kept if a checkpoint's flags are
    still to be added.

    Returns:
        the argv, and by destination the FILE:LINE of each flag that a file gives.

    Raises:
        UsageError: a file is missing or is not a mapping, a key is unknown, or a value is not of
            its type.
    """
    rest = list(argv)
    flags: list[str] = []
    places: dict[str, str] = {}
    settings = read_settings(config_paths(argv))
    settings.pop("plugin", None)  # plugin_files.py has loaded what it names
    actions = {key: _action_of(parser, key, own.place) for key, own in settings.items()}
    replaced = replaced_by(given_flags(parser, argv))
    if PER_SPLIT & {actions[key].dest for key, own in settings.items() if own.value is not None}:
        replaced.add("split")
    undone: set[str] = set()
    for key, setting in settings.items():
        negation = f"--no-{key.replace('_', '-')}"
        if negation in argv and negation not in actions_of(parser):
            undone.add(negation)
        elif actions[key].dest not in replaced:
            flags += _as_flags(actions[key], key, *setting)
            places[actions[key].dest] = setting.place
    _check_values(parser, flags, places)
    if GOES_ON not in (*flags, *rest):  # else they also drop a checkpoint's flags, added later
        rest = [argument for argument in rest if argument not in undone]
    return flags + rest, places


def _check_values(
    parser: argparse.ArgumentParser, flags: Sequence[str], places: dict[str, str]
) -> None:
    try:
        parser.parse_known_args(flags)
    except UsageError as error:  # "argument --lr: invalid float value: 'fast'"
        flag = re.split("[:/]", str(error).removeprefix("argument "))[0]
        raise UsageError(f"--config {places[actions_of(parser)[flag].dest]}: {error}") from error


def _action_of(parser: argparse.ArgumentParser, key: str, place: str) -> argparse.Action:
    action = actions_of(parser).get(flag_of(key))
    if key == "config":
        raise UsageError(f"--config {place}: 'config' is a flag alone: a file has `include:`.")
    if action is None:
        raise UsageError(f"--config {place}: unknown key '{key}': {nearest(parser, key)}")
    return action


def _as_flags(action: argparse.Action, key: str, value: Any, place: str) -> list[str]:
    flag = flag_of(key)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(
                f"--config {place}: '{key}' is a switch: true or false, not {value!r}."
            )
        if isinstance(action, argparse.BooleanOptionalAction):
            return [flag if value else negation_of(flag)]
        return [flag] if value else []
    if value is None:
        return []
    takes_several = action.nargs not in (None, "?")
    if takes_several and isinstance(value, str) and " " in value:
        raise UsageError(f"--config {place}: '{key}' {value!r} is a string: give a list, [a, b].")
    values = value if isinstance(value, list) and takes_several else [value]
    if any(isinstance(item, bool) for item in values):
        raise UsageError(
            f"--config {place}: '{key}' takes a value, not {value!r}: quote words such as no or "
            "off; null unsets a key."
        )
    arguments = [_text(item) for item in values]
    return [f"{flag}={arguments[0]}"] if len(arguments) == 1 else [flag, *arguments]


def _text(item: Any) -> str:
    """Return a value's text; Megatron takes lists, [0,1], and patterns, ([0,1])*2, unspaced."""
    text = str(item)
    return text.replace(" ", "") if text.startswith(("[", "([")) else text
