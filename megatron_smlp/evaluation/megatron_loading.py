"""A checkpoint -> Megatron's model of it, in the layout that the command line asks for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch

from megatron_smlp.checkpoints.tensors import main_dtype
from megatron_smlp.data.tokenizers.model_tokenizer import resolve_for
from megatron_smlp.data.tokenizers.spec import Tokenizer, TokenizerSpec
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.recorded import (
    open_checkpoint,
    tokenizer_flags,
    tokenizer_record,
)

# What Megatron asks of a training, and what keeps it from looking for the rest of one.
NO_TRAINING = """
    --mock-data --micro-batch-size 1 --train-iters 1 --lr 0 --eval-iters 0 --no-load-optim
    --no-load-rng --no-resume --hidden-dropout 0 --attention-dropout 0
"""


def load_model(
    checkpoint: str, flags: Sequence[str], *, dtype: str = "auto"
) -> tuple[argparse.Namespace, list[Any], Tokenizer]:
    """Start Megatron and load the newest checkpoint of a folder. Collective.

    Args:
        flags: Megatron's, from the command line: layout, another tokenizer.
        dtype: to compute in; "auto": what the weights are stored in, as an exported model does.

    Returns:
        the arguments, this rank's model chunks, the tokenizer of the texts to score.

    Raises:
        UsageError: no checkpoint, flags that contradict it, another vocabulary.
    """
    saved = open_checkpoint(checkpoint)
    from megatron_smlp.flags.from_model_record import model_words
    from megatron_smlp.flags.parse import build_parser, parse_arguments
    from megatron_smlp.megatron_patches import table
    from megatron_smlp.platform import choice, cpu

    choice.check()
    cpu.apply()
    table.apply()
    parser = build_parser()
    spec = _tokenizer_given(parser, flags) or tokenizer_record(saved)
    tokenizer = resolve_for(
        spec, source=f"--checkpoint {checkpoint}", entries=saved.flags["vocab_size"]
    )
    args = parse_arguments(
        [
            *NO_TRAINING.split(),
            *model_words(parser, saved.flags),
            *tokenizer_flags(spec),
            *_precision_flags(parser, flags, dtype, stored=main_dtype(saved.specs)),
            *flags,
            *("--load", str(checkpoint)),
        ]
    )
    with args.thawed():
        return args, _build_and_load(args), tokenizer


def sequence_length(args: argparse.Namespace, wanted: int | None) -> int:
    """Tokens that go into the model at once.

    Args:
        args: of the loaded model.
        wanted: None takes the length of the training.

    Raises:
        UsageError: the model has no weights for so many, or the layout cannot cut them evenly.
    """
    if wanted is None:
        return int(args.seq_length)
    any_length = args.toeplitz and args.position_embedding_type != "learned_absolute"
    if wanted > args.seq_length and not any_length:
        raise UsageError(
            f"--seq-length {wanted} is over the {args.seq_length} tokens of the training: only "
            "spatial gating with --toeplitz, and without learned positions, reads longer "
            f"sequences; give at most {args.seq_length}"
        )
    size = args.tensor_model_parallel_size
    if args.sequence_parallel and wanted % size:
        raise UsageError(
            f"--seq-length {wanted} is not a multiple of --tensor-model-parallel-size {size}, over "
            "which sequence parallelism cuts it: give a multiple"
        )
    return wanted


def _tokenizer_given(parser: argparse.ArgumentParser, flags: Sequence[str]) -> TokenizerSpec | None:
    given, _ = parser.parse_known_args(list(flags))
    if given.tokenizer_type is None:
        return None
    return TokenizerSpec.from_arguments(given)


def _precision_flags(
    parser: argparse.ArgumentParser, flags: Sequence[str], dtype: str, *, stored: torch.dtype
) -> list[str]:
    """Megatron's flag for `dtype`, unless the command line has it already."""
    given, _ = parser.parse_known_args(list(flags))
    flag_of = {"bfloat16": "--bf16", "float16": "--fp16"}
    typed = [flag for flag in flag_of.values() if getattr(given, flag.strip("-"))]
    wanted = flag_of.get(str(stored).removeprefix("torch.") if dtype == "auto" else dtype)
    if not typed:
        return [wanted] if wanted else []
    if dtype != "auto" and typed != [wanted]:
        raise UsageError(f"{typed[0]} contradicts --dtype {dtype}: give one of them")
    return []


def _build_and_load(args: argparse.Namespace) -> list[Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder
    from torch.distributed import HashStore

    from megatron_smlp.model import model_config

    args.moe_eval_capacity_factor = None  # a score must not depend on what else is in its batch
    one_process = "MASTER_ADDR" not in os.environ
    initialize_megatron(allow_no_cuda=True, store=HashStore() if one_process else None)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = GPTModelBuilder(model_config(args))
    stages: list[Any] = builder.build_distributed_models(groups, wrap_with_ddp=False)
    try:
        load_checkpoint(stages, None, None, strict=True)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"--checkpoint {args.load} cannot be loaded: {reason}") from error
    return stages
