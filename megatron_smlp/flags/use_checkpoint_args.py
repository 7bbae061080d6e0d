"""`--use-checkpoint-args`: resume a run with the flags that its checkpoint recorded.

The command line overrides them, and `--no-KEY` drops one. Megatron's flag of this name takes some
shapes of the model from a pickle; here everything comes from `run.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints.folders import folders_to_try, is_same_folder, iteration_folder
from megatron_smlp.checkpoints.run_record import START_FLAGS, read_run_record
from megatron_smlp.checkpoints.tokenizer_copy import FLAGS, found_tokenizer
from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.exclusive import replaced_by
from megatron_smlp.flags.parser_actions import actions_of

FLAG = "--use-checkpoint-args"


def with_checkpoint_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put the flags of the checkpoint before the given ones, if FLAG is among these.

    The run saves where the checkpoint is, unless --save, --no-save or --finetune is given. If it
    saves there, it also continues that run's logs.

    Raises:
        UsageError: there is no checkpoint, or none that recorded its flags.
    """
    if FLAG not in argv:
        return list(argv)
    own = [argument for argument in argv if argument != FLAG]
    known, _ = parser.parse_known_args(own)
    load = known.load or known.save
    if load is None:
        raise UsageError(f"{FLAG} takes the flags of a checkpoint: name it with --load.")
    step = known.ckpt_step or known.branch_from
    if step and not iteration_folder(load, step).is_dir():  # --keep-last may have deleted it
        own_folders = known.save and folders_to_try(known.save)
        load, step = known.save if own_folders else load, None
    arguments = _recorded_arguments(load, step)
    options = actions_of(parser)
    given = {action.dest for action, _ in _groups(options, own) if action}
    replaced = (START_FLAGS | given | replaced_by(given)) - {"allow_untested_flag"}  # names add up
    negated = {
        word: flag
        for word in own
        if word not in options and (flag := word.replace("--no-", "--", 1)) in options
    }
    own = [word for word in own if word not in negated]
    is_told = {"save", "finetune"} & given or "--save" in negated.values()
    if is_told and not is_same_folder(known.save, load):
        replaced |= {"branch_from"}  # what goes on in another folder is not that branch
    kept: list[str] = []
    for action, group in _groups(options, arguments):
        if group[0].split("=")[0] in negated.values():
            continue
        if action and action.dest not in replaced:
            kept += _with_copy(group, Path(load)) if action.dest in FLAGS else group
    where = [] if is_told else ["--save", load]
    where += [] if "load" in given else ["--load", load]
    goes_on = not is_told or ("finetune" not in given and is_same_folder(known.save, load))
    for name in ("log_dir", "tensorboard_dir"):
        is_settled = name in given or flag_of(name) in negated.values()
        if goes_on and not is_settled and (value := _value(options, arguments, name)):
            where += [flag_of(name), value]
    return [*kept, *where, *own]


def _with_copy(group: list[str], run: Path) -> list[str]:
    """Replace a tokenizer's path by that of the run's copy if the original is gone."""
    flag, equals, path = group[0].partition("=")
    path = found_tokenizer(path if equals else group[1], run)
    return [f"{flag}={path}"] if equals else [flag, path]


def _recorded_arguments(load: str, step: int | None) -> list[str]:
    folders = folders_to_try(load, step)
    if not folders:
        raise UsageError(f"{FLAG}: {load} holds no checkpoint. Give the --save folder of a run.")
    for folder in folders:
        record: dict[str, Any] | None = read_run_record(folder)
        if record is not None:
            return [str(argument) for argument in record["command_line"]]
    raise UsageError(
        f"{FLAG}: {folders[0]} has no intact run.json, so its flags are unknown: leave {FLAG} out "
        "and give them."
    )


def _groups(
    options: dict[str, argparse.Action], arguments: Sequence[str]
) -> Iterator[tuple[argparse.Action | None, list[str]]]:
    """Yield the action of each flag, None if unknown, with the flag and its values."""
    group: list[str] = []
    for argument in arguments:
        if argument.split("=")[0] in options and group:
            yield options.get(group[0].split("=")[0]), group
            group = []
        group.append(argument)
    if group:
        yield options.get(group[0].split("=")[0]), group


def without(
    names: Set[str], parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> list[str]:
    """Return the command line without the flags of these destinations."""
    groups = _groups(actions_of(parser), arguments)
    return [
        text for action, group in groups if not action or action.dest not in names for text in group
    ]


def _value(options: dict[str, argparse.Action], arguments: Sequence[str], name: str) -> str | None:
    value = None
    for action, group in _groups(options, arguments):
        if action and action.dest == name:
            value = group[1] if len(group) > 1 else group[0].partition("=")[2]
    return value
