"""Command line and YAML -> checked arguments, in three phases.

1. parse     the YAML file's keys become flags, the command line comes after them and so wins
2. defaults  what is left out follows from other flags, the machine, the checkpoint (defaults.py)
3. check     refusals, which name flag, value, what is allowed and what to do (check.py); the
             namespace is frozen by then. Megatron's own validation is the last of them.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_smlp.checkpoints import tokenizer_copy
from megatron_smlp.checkpoints.model_record import check_against_checkpoint
from megatron_smlp.command_line import flag_of
from megatron_smlp.data.blending import SPLIT_FLAGS
from megatron_smlp.data.pairs.indexed import idx_path
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.check import check, validate
from megatron_smlp.flags.check_routers import MEGATRON_ROUTER_FLAGS, TOP_K_FLAGS
from megatron_smlp.flags.config_file import read_yaml
from megatron_smlp.flags.defaults import fill_in
from megatron_smlp.flags.exclusive import PER_SPLIT, replaced_by
from megatron_smlp.flags.from_checkpoint import with_checkpoint_flags
from megatron_smlp.flags.namespace import Arguments
from megatron_smlp.flags.unused_flags import OTHER_LAYER_FLAGS, READ_NOWHERE
from megatron_smlp.options import ModelOptions, RunOptions

FILES = (*tokenizer_copy.FLAGS, "hash_table", "data_args_path")
PREFIXES = ("data_path", *SPLIT_FLAGS)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Return Megatron's namespace with our flags in it, validated by Megatron and frozen.

    megatron_patches must be applied before, and platform/cpu.py where there is no GPU.

    Raises:
        UsageError: with the flag, its value, what is allowed, and what to do.
    """
    parser = build_parser()
    args = parse(parser, argv)
    fill_in(args)
    args.freeze()
    check(parser, args)
    validate(args)
    check_against_checkpoint(args)
    return args


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Arguments:
    """Parse, as the first phase: refuse unknown flags, and tell given values from defaults.

    Raises:
        UsageError: a flag or key is unknown, or a value is not of its type.
    """
    argv = with_checkpoint_flags(parser, expand_config(parser, argv))
    argv = with_absolute_paths(_options(parser), argv)
    _refuse_unknown(parser, argv)
    args = Arguments.of(_parse_like_megatron(argv))
    args.explicit_flags = {name: getattr(args, name) for name in given_flags(parser, argv)}
    args.command_line = argv
    args.data_contents = {}  # by prefix; training/data.py looks
    _limit_cuda_connections(args)
    return args


def _limit_cuda_connections(args: argparse.Namespace) -> None:
    """Megatron insists on one connection under tensor parallelism, FSDP refuses it.

    CUDA reads it when it starts, which importing Megatron may do: the launchers export it.
    """
    sharded = args.use_torch_fsdp2 or args.use_megatron_fsdp
    if args.tensor_model_parallel_size > 1 and not sharded:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def build_parser() -> argparse.ArgumentParser:
    """Megatron's parser with our two groups of flags."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(
        prog="pretrain_smlp.py",
        usage="%(prog)s --config FILE.yaml [--flag value ...]",
        description="Pretrain sparse all-MLP language models and their baselines.",
        allow_abbrev=False,
    )
    return _with_readable_help(_add_options(add_megatron_arguments(parser)))


def _with_readable_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron 0.19 has a bare percent sign in a flag's help, at which argparse stops."""
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except ValueError:
            action.help = (action.help or "").replace("%", "%%")
    return parser


def _add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory(ModelOptions).build_group(parser, "sparse all-MLP model")
    ArgumentGroupFactory(RunOptions).build_group(parser, "run")
    parser.error = _raise_usage  # type: ignore[method-assign]
    return parser


def _raise_usage(message: str) -> NoReturn:
    """argparse would print some hundred lines of usage before the one that matters."""
    raise UsageError(message)


def _parse_like_megatron(argv: Sequence[str]) -> argparse.Namespace:
    from megatron.training.arguments import parse_args

    before = sys.argv
    sys.argv = [before[0], *argv]  # Megatron reads sys.argv itself, and rank and world size
    try:
        return parse_args(extra_args_provider=_add_options)
    finally:
        sys.argv = before


def expand_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put the flags of `--config FILE.yaml` before those of the command line.

    A key of the file is left out where `--no-KEY` is on the command line, and where a flag is that
    stands in for it; of the file's own keys, paths for each split stand in for `split`.

    Raises:
        UsageError: the file is missing or is not a mapping, or a key is unknown.
    """
    path = _config_path(argv)
    if path is None:
        return list(argv)
    rest = list(argv)
    flags: list[str] = []
    keys = {key: (_action_of(parser, key, path), v) for key, v in read_yaml(path).items()}
    replaced = replaced_by(given_flags(parser, argv))
    if PER_SPLIT & {action.dest for action, _ in keys.values()}:
        replaced.add("split")
    for key, (action, value) in keys.items():
        negation = f"--no-{key.replace('_', '-')}"
        if negation in rest and negation not in _options(parser):
            rest.remove(negation)
        elif action.dest not in replaced:
            flags += _as_flags(action, key, value, path)
    return flags + rest


def _config_path(argv: Sequence[str]) -> Path | None:
    paths = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    paths += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    if len(paths) > 1:
        raise UsageError(
            f"--config {' and --config '.join(sorted(paths))}: give one; a line `include: FILE` in "
            "it takes the keys of another."
        )
    return Path(paths[0]) if paths else None


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return parser._option_string_actions


def _action_of(parser: argparse.ArgumentParser, key: str, path: Path) -> argparse.Action:
    action = _options(parser).get(flag_of(key))
    if action is None:
        raise UsageError(f"--config {path}: unknown key '{key}'. {nearest(parser, key)}")
    return action


def nearest(parser: argparse.ArgumentParser, name: str) -> str:
    """`Did you mean ...?` for a flag or key that does not exist."""
    refused = {*READ_NOWHERE, *OTHER_LAYER_FLAGS, *MEGATRON_ROUTER_FLAGS}.difference(TOP_K_FLAGS)
    known = [
        option.removeprefix("--")
        for option, action in _options(parser).items()
        if action.dest not in refused
    ]
    close = difflib.get_close_matches(name.lstrip("-").replace("_", "-"), known, n=3, cutoff=0.6)
    if not close:
        return "`pretrain_smlp.py --help-all` lists every flag."
    return f"Did you mean {' or '.join(f'--{option}' for option in close)}?"


def _as_flags(action: argparse.Action, key: str, value: Any, path: Path) -> list[str]:
    flag = flag_of(key)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"--config {path}: '{key}' is a switch: true or false, not {value!r}.")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [flag if value else flag.replace("--", "--no-", 1)]
        return [flag] if value else []
    if value is None:
        return []
    values = value if isinstance(value, list) and action.nargs else [value]
    arguments = [str(item).replace(", ", ",") for item in values]  # [0,1]: Megatron takes no blanks
    return [f"{flag}={arguments[0]}"] if len(arguments) == 1 else [flag, *arguments]


def _refuse_unknown(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    known, unknown = parser.parse_known_args(list(argv))
    if known.yaml_cfg:
        raise UsageError(
            f"--yaml-cfg {known.yaml_cfg} is Megatron's file of another form: give --config."
        )
    for word in unknown:
        if word.startswith("-"):
            flag = word.split("=")[0]
            raise UsageError(f"{flag} is not a flag. {nearest(parser, flag)}")
    if unknown:
        raise UsageError(f"'{unknown[0]}' belongs to no flag.")


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> frozenset[str]:
    """Destinations of the flags that the command line or the YAML file names."""
    options = _options(parser)
    arguments = (word.split("=")[0] for word in argv)
    return frozenset(options[word].dest for word in arguments if word in options)


def with_absolute_paths(options: Mapping[str, argparse.Action], argv: Sequence[str]) -> list[str]:
    """Name the files of a command line by absolute paths; what is not there, as a name of the hub,
    stays as it is.

    A checkpoint records its flags, and is read from other folders than the one that its run was
    started in: to generate, to convert, or to go on by --use-checkpoint-args.
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
    path = Path(value)
    is_there = path.exists() if name in FILES else name in PREFIXES and idx_path(value).is_file()
    return str(path.absolute()) if is_there else value
