"""A checkpoint -> Megatron's model of it, in the layout that the command line asks for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from megatron_smlp.data.tokenizers import Tokenizer, TokenizerSpec
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.recorded import (
    open_checkpoint,
    resolve_for,
    tokenizer_flags,
    tokenizer_record,
)

# What Megatron asks of a training, and what keeps it from looking for the rest of one.
NO_TRAINING = """
    --mock-data --micro-batch-size 1 --train-iters 1 --lr 0 --eval-iters 0 --no-load-optim
    --no-load-rng --no-resume --hidden-dropout 0 --attention-dropout 0
"""


def load_model(
    checkpoint: str, flags: Sequence[str]
) -> tuple[argparse.Namespace, list[Any], Tokenizer]:
    """Start Megatron and load the newest checkpoint of a folder. Collective.

    Args:
        flags: Megatron's, from the command line: layout, precision, another tokenizer.

    Returns:
        the arguments, this rank's model chunks, the tokenizer of the texts to score.

    Raises:
        UsageError: no checkpoint, flags that contradict it, another vocabulary.
    """
    saved = open_checkpoint(checkpoint)
    from megatron_smlp.arguments import build_parser, parse_arguments
    from megatron_smlp.platform import cpu
    from megatron_smlp.training.model_words import model_words

    cpu.apply()
    parser = build_parser()
    spec = _tokenizer_given(parser, flags) or tokenizer_record(saved)
    tokenizer = resolve_for(spec, saved.flags, checkpoint)
    args = parse_arguments(
        [
            *NO_TRAINING.split(),
            *model_words(parser, saved.flags),
            *tokenizer_flags(spec),
            *flags,
            *("--load", str(checkpoint)),
        ]
    )
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
