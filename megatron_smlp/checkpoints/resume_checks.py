"""Compare a run with the checkpoint that it resumes from: its model, its data, its flags."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import Any

from megatron_smlp.checkpoints.folders import MODEL, iteration_folder
from megatron_smlp.checkpoints.model_record import model_flags, read_model_flags
from megatron_smlp.checkpoints.run_record import START_FLAGS, plain, read_run_record
from megatron_smlp.collectives import from_first_rank
from megatron_smlp.command_line import flag_of, negation_of, word_of
from megatron_smlp.errors import UsageError
from megatron_smlp.options import MODEL_FLAGS, PLUGIN_OPTIONS
from megatron_smlp.provenance import software


def check_same_model(args: argparse.Namespace, iteration: int | None) -> None:
    """Refuse flags that define a different model from the one in --load.

    Args:
        iteration: the checkpoint's; None: the newest.

    Raises:
        UsageError: with the flag and both values.
    """
    wanted = model_flags(args)
    for name, there in read_model_flags(args.load, iteration).items():
        if name == "plugins":  # already compared when the checkpoint's flags were read
            continue
        here = wanted.get(name, there)
        may_change = name in MODEL_FLAGS and MODEL_FLAGS[name].may_change
        if here != there and not may_change:
            if name == "add_bias_linear":
                name, here, there = "disable_bias_linear", not here, not there
            flag = flag_of(name)
            if name == "vocab_size":
                raise UsageError(
                    f"the tokenizer has {here} entries, that of the checkpoint {args.load} had "
                    f"{there}: give the run's tokenizer, or another folder."
                )
            remedy = f"give {flag} {shlex.quote(word_of(there))}"
            if there is None:
                remedy = f"leave {flag} out"
            elif isinstance(there, bool):
                is_on = name in PLUGIN_OPTIONS and PLUGIN_OPTIONS[name].default is True
                off = f"give {negation_of(flag)}" if is_on else f"leave {flag} out"
                remedy = f"give {flag}" if there else off
            raise UsageError(
                f"{flag} {here} contradicts the checkpoint {args.load}, which was made with "
                f"{there}: {remedy}, or give another folder."
            )


def compare_run(args: argparse.Namespace, iteration: int, say: Callable[[str], None]) -> None:
    """Report flags that changed and, if that is allowed, datasets whose content changed.
    Collective.

    Raises:
        UsageError: a dataset's content changed, and that is not allowed.
    """
    folder = iteration_folder(args.load, iteration)
    if not (folder / MODEL).exists():
        say(
            f"WARNING: {folder} has no {MODEL}: it was not written by this program, its model is "
            "not compared with the flags, and Megatron's own layers name tensors differently "
            "(docs/from-megatron-lm.md)"
        )
    record = read_run_record(folder) if args.rank == 0 else None
    if record and (changed := _changes(record, args)):
        say(f"changed since iteration {iteration}: {', '.join(changed)}")
    lacks_optimizer = record and record["flags"].get("no_save_optim")
    if lacks_optimizer and not (args.finetune or args.no_load_optim or args.skip_train):
        say(
            f"WARNING: iteration {iteration} was saved with --no-save-optim: optimizer and "
            "learning rate schedule start anew"
        )
    differing = from_first_rank(_other_data(record, args) if record else [])
    if not differing or args.finetune:
        return
    what = f"{', '.join(differing)} holds other data than at iteration {iteration} of {args.load}"
    if not args.allow_data_mismatch:
        raise UsageError(
            f"{what}: restore the dataset, or resume with the new one by --allow-data-mismatch "
            "(its samples then continue the old one's count)."
        )
    say(f"WARNING: {what} (--allow-data-mismatch)")


def _other_data(record: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Return the prefixes of datasets whose content has changed since the save."""
    before = record.get("data", {})
    now = args.data_contents
    return [prefix for prefix, content in now.items() if before.get(prefix, content) != content]


def _changes(record: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Return how this run differs from the checkpoint's, such as `--lr 0.001 -> 0.0005`.

    Compares the flags that were given then or are given now, the number of ranks, and the sources.
    """
    names = {*record["given"], *args.explicit_flags} - START_FLAGS
    before = record["flags"]
    texts = []
    for name in ["world_size", *sorted(names)]:
        now = plain(getattr(args, name, None))
        if name in before and before[name] != now:
            title = "ranks" if name == "world_size" else flag_of(name)
            texts.append(f"{title} {before[name]} -> {now}")
    then, here = record.get("software", {}), software()
    if then.get("sources", here["sources"]) != here["sources"]:
        texts.append(
            " -> ".join(f"sources {x['sources']} (commit {x['commit']})" for x in (then, here))
        )
    return texts
