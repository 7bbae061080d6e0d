"""Keeps the padded size of a checkpoint's vocabulary when a run goes on in another layout.

Megatron pads the vocabulary to a multiple of --make-vocab-size-divisible-by times the tensor
parallel size. The padding takes part in the softmax, so a run that goes on with another number of
padding rows, which start at random, would see its loss jump.
"""

from __future__ import annotations

import argparse

from megatron_smlp.checkpoints.model_record import read_model_flags


def keep_padding(args: argparse.Namespace) -> None:
    """Pad as the checkpoint to be loaded does, wherever the tensor parallel size divides that.

    Where it does not, and where a run that starts anew from another's weights (--finetune) says
    how it wants to pad, Megatron pads.
    """
    given = args.explicit_flags
    if not args.load or "padded_vocab_size" in given:
        return
    if args.finetune and "make_vocab_size_divisible_by" in given:
        return
    padded = (read_model_flags(args.load, args.ckpt_step) or {}).get("padded_vocab_size")
    if padded is not None and padded % args.tensor_model_parallel_size == 0:
        args.padded_vocab_size = padded
