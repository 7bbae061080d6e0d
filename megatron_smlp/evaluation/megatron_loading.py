"""Load a checkpoint into Megatron's own model, in the layout that the command line asks for.

The flags that build the model and its tokenizer come from the checkpoint's own records.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_smlp.checkpoints.choosing import problems
from megatron_smlp.checkpoints.folders import (
    TRACKER,
    iteration_folder,
    iteration_of,
    release_folder,
    tracked_iteration,
)
from megatron_smlp.checkpoints.tensors import main_dtype
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.command_line import flag_of
from megatron_smlp.data.tokenizers.model_tokenizer import resolve_for
from megatron_smlp.data.tokenizers.spec import Tokenizer, TokenizerSpec
from megatron_smlp.errors import NoGoodCheckpointError, UsageError

# The flags that Megatron requires of a training, and those that stop it from loading one's state.
NO_TRAINING = """
    --mock-data --micro-batch-size 1 --train-iters 1 --lr 0 --eval-iters 0 --no-load-optim
    --no-load-rng --no-resume --hidden-dropout 0 --attention-dropout 0
"""
TAKE_A_SIZE = ("NullTokenizer", "ByteLevelTokenizer", "TikTokenizer")


def load_model(
    checkpoint: str, flags: Sequence[str], *, dtype: str = "auto"
) -> tuple[argparse.Namespace, list[Any], Tokenizer]:
    """Start Megatron and load the checkpoint of a folder that --ckpt-step names, or the newest.
    Collective.

    Args:
        flags: Megatron's, from the command line: layout, another tokenizer.
        dtype: to compute in; "auto": what the weights are stored in, as an exported model does.

    Returns:
        the arguments, this rank's model chunks, the tokenizer of the texts to score.

    Raises:
        UsageError: no checkpoint, flags that contradict it, another vocabulary.
        NoGoodCheckpointError: a file of it is damaged.
    """
    from megatron_smlp.flags.model_arguments import model_arguments
    from megatron_smlp.flags.parse import build_parser, parse_arguments
    from megatron_smlp.megatron_patches import table
    from megatron_smlp.platform import choice, cpu

    choice.check()
    cpu.apply()
    table.apply()
    from megatron.training import get_signal_handler

    parser = build_parser()
    given, _ = parser.parse_known_args(list(flags))
    try:
        saved = TorchDistCheckpoint(checkpoint, iteration=given.ckpt_step)
    except UsageError as error:
        raise UsageError(f"--checkpoint {checkpoint}: {error}") from error
    if given.tokenizer_type:
        spec = TokenizerSpec.from_arguments(given)
    else:
        spec = TokenizerSpec.recorded(_recorded(saved), trusts=given.trust_remote_code)
    tokenizer = resolve_for(
        spec, source=f"--checkpoint {checkpoint}", entries=saved.flags["vocab_size"]
    )
    args = parse_arguments(
        [
            *NO_TRAINING.split(),
            *model_arguments(parser, saved.flags),
            *tokenizer_flags(spec),
            *_precision_flags(given, dtype, stored=main_dtype(saved.specs)),
            *flags,
            *_load_flags(saved.folder),
        ]
    )
    # It notes a SIGTERM for a training loop, and none will look: the process would go on.
    get_signal_handler().release()
    with args.thawed():
        return args, _build_and_load(args, saved.folder), tokenizer


def _load_flags(checkpoint: Path) -> list[str]:
    """Return Megatron's flags for one checkpoint: without, it would take what the tracker names, or
    random weights where there is none.

    Raises:
        UsageError: Megatron would read another folder whatever the flags.
    """
    for folder in dict.fromkeys([checkpoint.absolute(), checkpoint.resolve()]):
        step = iteration_of(folder)
        if folder == _read_by_megatron(folder.parent, step):
            return ["--load", str(folder.parent), *(["--ckpt-step", str(step)] if step else [])]
    raise UsageError(
        f"--checkpoint {checkpoint} is read by its number or by {TRACKER} beside it, and they name "
        "another folder: give a copy by convert_checkpoint.py --to torch_dist in place of it"
    )


def _read_by_megatron(run: Path, step: int | None) -> Path | None:
    iteration = step or tracked_iteration(run)
    at_step = None if iteration is None else iteration_folder(run, iteration)
    return release_folder(run) or at_step


def sequence_length(args: argparse.Namespace, wanted: int | None) -> int:
    """Return the number of tokens that go into the model at once.

    Args:
        args: of the loaded model.
        wanted: None for the length of the training.

    Raises:
        UsageError: the model has no weights for so many, or the layout cannot cut them evenly.
    """
    if wanted is None:
        return int(args.seq_length)
    any_length = args.toeplitz and args.position_embedding_type != "learned_absolute"
    if wanted > args.seq_length and not any_length:
        raise UsageError(
            f"--seq-length {wanted} is over the {args.seq_length} tokens of the training: only "
            "a model with --toeplitz, and without learned positions, reads longer "
            f"sequences; give at most {args.seq_length}"
        )
    size = args.tensor_model_parallel_size
    if args.sequence_parallel and wanted % size:
        raise UsageError(
            f"--seq-length {wanted} is not a multiple of --tensor-model-parallel-size {size}, over "
            "which sequence parallelism cuts it: give a multiple"
        )
    return wanted


def _recorded(checkpoint: TorchDistCheckpoint) -> Any:
    """Return the arguments of the run, which name its tokenizer."""
    if not getattr(checkpoint.args, "tokenizer_type", None):
        raise UsageError(
            f"--checkpoint {checkpoint.folder} does not record a tokenizer: give --tokenizer-type "
            "and its other flags"
        )
    return checkpoint.args


def tokenizer_flags(spec: TokenizerSpec) -> list[str]:
    """Return the command line of a tokenizer."""
    flags: list[str] = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if not value or value == field.default:
            continue
        if field.name == "vocab_size" and spec.tokenizer_type not in TAKE_A_SIZE:
            continue
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        flags += [flag_of(field.name), *map(str, values)]
    return flags


def _precision_flags(given: argparse.Namespace, dtype: str, *, stored: torch.dtype) -> list[str]:
    """Return Megatron's flag for `dtype`, unless the command line has it already."""
    names = {"bfloat16": "--bf16", "float16": "--fp16"}
    typed = [flag for flag in names.values() if getattr(given, flag.strip("-"))]
    wanted = names.get(str(stored).removeprefix("torch.") if dtype == "auto" else dtype)
    if not typed:
        return [wanted] if wanted else []
    if dtype != "auto" and typed != [wanted]:
        raise UsageError(f"{typed[0]} contradicts --dtype {dtype}: give one of them")
    return []


def _build_and_load(args: argparse.Namespace, checkpoint: Path) -> list[Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder
    from torch.distributed import HashStore

    from megatron_smlp.checkpoints.state import read_weights
    from megatron_smlp.model import model_config

    args.moe_eval_capacity_factor = None  # a score must not depend on what else is in its batch
    one_process = "MASTER_ADDR" not in os.environ
    initialize_megatron(allow_no_cuda=True, store=HashStore() if one_process else None)
    if found := problems(checkpoint):
        raise NoGoodCheckpointError(f"--checkpoint {checkpoint} is damaged ({'; '.join(found)})")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = GPTModelBuilder(model_config(args))
    stages: list[Any] = builder.build_distributed_models(groups, wrap_with_ddp=False)
    try:
        read_weights(args, stages, groups, checkpoint)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"--checkpoint {checkpoint} cannot be loaded: {reason}") from error
    return stages
