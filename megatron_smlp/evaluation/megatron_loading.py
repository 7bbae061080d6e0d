"""Load a checkpoint into Megatron's own model, in the layout that the command line specifies.

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
    RELEASE,
    iteration_folder,
    iteration_of,
    tracked_folder,
)
from megatron_smlp.checkpoints.tensors import main_dtype
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.command_line import flag_of
from megatron_smlp.data.tokenizers.factory import resolve_for
from megatron_smlp.data.tokenizers.folder import recorded_tokenizer
from megatron_smlp.data.tokenizers.spec import (
    SIZED_TYPES,
    Tokenizer,
    TokenizerSpec,
    named_or_moved,
)
from megatron_smlp.errors import NoGoodCheckpointError, UsageError
from megatron_smlp.launching.training_argv import given as option_given
from megatron_smlp.systems import ARCHITECTURES

# Flags that Megatron requires for training, and flags that keep it from loading training state.
NO_TRAINING = """
    --mock-data --micro-batch-size 1 --train-iters 1 --lr 0 --eval-iters 0 --no-load-optim
    --no-load-rng --no-resume --hidden-dropout 0 --attention-dropout 0
"""


def load_model(
    checkpoint: str, flags: Sequence[str], *, dtype: str = "auto"
) -> tuple[argparse.Namespace, list[Any], Tokenizer]:
    """Start Megatron and load a folder's checkpoint: that of --ckpt-step, or the newest.
    Collective.

    Args:
        flags: Megatron's flags from the command line: the layout, another tokenizer.
        dtype: the compute dtype; "auto": that of the stored weights, as for an exported model.

    Returns:
        the arguments, this rank's model chunks, and the tokenizer for the texts to score.

    Raises:
        UsageError: there is no checkpoint, flags contradict it, or the vocabulary differs.
        NoGoodCheckpointError: one of its files is damaged.
    """
    from megatron_smlp.flags.model_arguments import model_arguments
    from megatron_smlp.flags.parse import build_parser, parse_arguments
    from megatron_smlp.megatron_patches import table
    from megatron_smlp.platform import choice, cpu

    if option_given("--platform", flags) == "cpu":
        choice.hide_gpus()
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
    folder = saved.folder.resolve()
    iteration = iteration_of(folder)
    if iteration is None and folder.name != RELEASE and tracked_folder(folder.parent) is None:
        name = iteration_folder(Path(), saved.iteration)
        raise UsageError(f"--checkpoint {checkpoint}: Megatron needs the name {name}: rename it.")
    spec = named_or_moved(given, recorded_tokenizer(saved.args, trusts=given.trust_remote_code))
    if spec is None:
        raise UsageError(
            f"--checkpoint {saved.folder} does not record a tokenizer: give --tokenizer-type and "
            "its other flags"
        )
    tokenizer = resolve_for(
        spec, source=f"--checkpoint {checkpoint}", entries=saved.flags["vocab_size"]
    )
    args = parse_arguments(
        [
            *NO_TRAINING.split(),
            *model_arguments(parser, saved.flags),
            *_document_flags(saved.args),
            *tokenizer_flags(spec),
            *_precision_flags(given, dtype, stored=main_dtype(saved.specs)),
            *flags,
            *("--load", str(folder.parent)),
            *(("--ckpt-step", str(iteration)) if iteration else ()),
        ]
    )
    # The handler records SIGTERM for a training loop; without one, the process would ignore it.
    get_signal_handler().release()
    args.load = str(folder)  # even if the run's tracker names another one
    return args, _build_and_load(args, folder), tokenizer


def sequence_length(args: argparse.Namespace, wanted: int | None) -> int:
    """Return the number of tokens that the model reads at once.

    Args:
        args: the arguments of the loaded model.
        wanted: the requested length; None: that of the training.

    Raises:
        UsageError: the model has no weights for so many, or the layout cannot split them evenly.
    """
    if wanted is None:
        return int(args.seq_length)
    hosts = any(mixer.plugin for mixer in ARCHITECTURES[args.architecture].mixers)
    learned = args.position_embedding_type == "learned_absolute"
    any_length = args.toeplitz and not (learned or hosts)
    if wanted > args.seq_length and not any_length:
        raise UsageError(
            f"--seq-length {wanted} exceeds the {args.seq_length} tokens of training: only "
            "a model with --toeplitz, without learned positions and plugins' mixers, reads longer "
            f"sequences; give at most {args.seq_length}"
        )
    size = args.tensor_model_parallel_size
    if args.sequence_parallel and wanted % size:
        raise UsageError(
            f"--seq-length {wanted} is not a multiple of --tensor-model-parallel-size {size}, by "
            "which sequence parallelism splits it: give a multiple"
        )
    return wanted


def tokenizer_flags(spec: TokenizerSpec) -> list[str]:
    """Return the command-line flags of a tokenizer."""
    flags: list[str] = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if not value or value == field.default:
            continue
        if field.name == "vocab_size" and spec.tokenizer_type not in SIZED_TYPES:
            continue
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        flags += [flag_of(field.name), *map(str, values)]
    return flags


def _document_flags(trained: argparse.Namespace) -> list[str]:
    """Return the flags that keep documents apart, as in training; they are not the model's."""
    flags: list[str] = []
    if getattr(trained, "reset_attention_mask", False):
        flags += ["--reset-attention-mask", "--transformer-impl", "local"]  # which it needs
    if getattr(trained, "reset_position_ids", False):
        flags.append("--reset-position-ids")
    return flags


def _precision_flags(given: argparse.Namespace, dtype: str, *, stored: torch.dtype) -> list[str]:
    """Return Megatron's flag for `dtype`, unless the command line has it already."""
    from megatron_smlp.platform import cpu

    names = {"bfloat16": "--bf16", "float16": "--fp16"}
    typed = [flag for flag in names.values() if getattr(given, flag.strip("-"))]
    wanted = names.get(str(stored).removeprefix("torch.") if dtype == "auto" else dtype)
    if not typed:
        if wanted is None or (dtype == "auto" and wanted == "--fp16" and cpu.needed()):
            return []  # fp32 holds the same weights, and a CPU has no fp16
        return [wanted]
    if dtype != "auto" and typed != [wanted]:
        raise UsageError(f"{typed[0]} contradicts --dtype {dtype}: give only one")
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
    if damage := problems(checkpoint):
        raise NoGoodCheckpointError(f"--checkpoint {checkpoint} is damaged ({'; '.join(damage)})")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = GPTModelBuilder(model_config(args))
    stages: list[Any] = builder.build_distributed_models(groups, wrap_with_ddp=False)
    try:
        read_weights(args, stages, groups, checkpoint)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"--checkpoint {checkpoint} cannot be loaded: {reason}") from error
    return stages
