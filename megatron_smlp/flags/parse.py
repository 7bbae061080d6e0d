"""Command line and YAML -> checked arguments, in three phases.

1. parse     turn YAML keys into flags; the command line comes after them and so overrides them
2. defaults  derive what was not given from other flags, the machine, the checkpoint (defaults.py)
3. check     refuse, naming the flag, its value, what is allowed and what to do (check.py), and
             assign nothing. Megatron's own validation comes last, and may assign.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial, wraps
from inspect import isfunction
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints import tokenizer_copy
from megatron_smlp.checkpoints.resume_checks import check_same_model
from megatron_smlp.data.blending import SPLIT_FLAGS
from megatron_smlp.data.pairs.indexed import idx_path, strip_suffix
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.check import check, validate
from megatron_smlp.flags.check_run import check_ranges
from megatron_smlp.flags.config_file import expand_config
from megatron_smlp.flags.defaults import fill_in
from megatron_smlp.flags.megatron_flags import refuse_untested
from megatron_smlp.flags.our_flags import add_our_flags, new_parser
from megatron_smlp.flags.parser_actions import actions_of, given_flags, nearest
from megatron_smlp.flags.use_checkpoint_args import with_checkpoint_flags

FILES = (*tokenizer_copy.FLAGS, "data_args_path", "per_split_data_args_path", "eval_tasks_data_dir")
PREFIXES = ("data_path", *SPLIT_FLAGS)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return Megatron's namespace with our flags in it, validated by Megatron.

    The caller must have applied megatron_patches and, where there is no GPU, platform/cpu.py.

    Raises:
        UsageError: with the flag, its value, what is allowed, and what to do.
    """
    parser = build_parser()
    args = parse(parser, argv)
    check_ranges(args)  # before defaults are derived from them
    fill_in(args)
    check(args)
    validate(args)
    if args.load:
        check_same_model(args, args.ckpt_step)
    return args


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Run the first phase: refuse unknown flags, and tell given values from defaults.

    Raises:
        UsageError: a flag or key is unknown, or a value is not of its type.
    """
    given = given_flags(parser, argv)
    expanded, places = expand_config(parser, argv)
    argv = with_checkpoint_flags(parser, expanded)
    argv = with_absolute_paths(actions_of(parser), argv)
    _refuse_unknown(parser, argv)
    args = _parse_like_megatron(argv)
    args.explicit_flags = {name: getattr(args, name) for name in given_flags(parser, argv)}
    places |= dict.fromkeys(given, "command line")
    args.places = {name: places.get(name, "checkpoint") for name in args.explicit_flags}
    args.command_line = argv
    args.data_contents = {}  # by prefix; training/data.py fills it in
    return args


def build_parser() -> argparse.ArgumentParser:
    """Build Megatron's parser with our flags added."""
    from megatron.training.arguments import add_megatron_arguments

    return _mended(add_our_flags(add_megatron_arguments(new_parser())))


def _mended(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Mend flags of Megatron 0.19: a help text with a bare percent sign, at which argparse stops,
    enum types that raise a KeyError, and lists of layers that raise a SyntaxError."""
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except ValueError:
            action.help = (action.help or "").replace("%", "%%")
        choices = list(action.choices or ())
        if choices and isinstance(choices[0], Enum):
            action.type = partial(_member, type(choices[0]))
        elif isfunction(action.type):
            action.type = _readable(action.type)
    return parser


def _readable(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Report SyntaxErrors as argparse expects: Megatron evaluates lists of layers as Python."""

    @wraps(kind)
    def read(text: str) -> Any:
        try:
            return kind(text)
        except SyntaxError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error.msg}") from error

    return read


def _member(kind: type[Enum], name: str) -> Enum:
    if name not in kind.__members__:
        names = ", ".join(kind.__members__)
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {names})")
    return kind[name]


def _refuse_unknown(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Check that all flags exist, and are tested or allowed.

    Raises:
        UsageError: a flag is not, or a word belongs to no flag.
    """
    known, unknown = parser.parse_known_args(list(argv))
    flags = dict.fromkeys(word.split("=")[0] for word in unknown if word.startswith("-"))
    if flags:
        raise UsageError(
            " ".join(f"{flag} is not a flag: {nearest(parser, flag)}" for flag in flags)
        )
    if unknown:
        raise UsageError(f"unknown argument '{unknown[0]}'.")
    refuse_untested(parser, argv, allowed=known.allow_untested_flag or ())


def _parse_like_megatron(argv: Sequence[str]) -> argparse.Namespace:
    from megatron.training.arguments import parse_args

    before = sys.argv
    sys.argv = [before[0], *argv]  # Megatron reads sys.argv itself, and rank and world size
    try:
        return parse_args(extra_args_provider=add_our_flags)
    finally:
        sys.argv = before


def with_absolute_paths(options: Mapping[str, argparse.Action], argv: Sequence[str]) -> list[str]:
    """Make the file paths of a command line absolute; what does not exist, such as a name on the
    hub, is left alone.

    A checkpoint records its flags, and may be read from another working directory than its run's:
    to generate, to convert, or to resume with --use-checkpoint-args.
    """
    absolute: list[str] = []
    name = ""
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag in options:
            name = options[flag].dest
            absolute.append(f"{flag}={_absolute(name, value)}" if equals else flag)
        else:
            absolute.append(_absolute(name, word))
    return absolute


def _absolute(name: str, value: str) -> str:
    path, index = Path(value), idx_path(strip_suffix(value))
    is_there = path.exists() if name in FILES else name in PREFIXES and index.is_file()
    return str(path.absolute()) if is_there else value
