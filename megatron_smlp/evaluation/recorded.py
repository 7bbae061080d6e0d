"""A checkpoint's own record of its model and tokenizer -> flags that build both again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.command_line import flag_of
from megatron_smlp.data.tokenizers.spec import TokenizerSpec
from megatron_smlp.errors import UsageError

TAKE_A_SIZE = ("NullTokenizer", "ByteLevelTokenizer", "TikTokenizer")


def open_checkpoint(checkpoint: str | Path) -> TorchDistCheckpoint:
    """The newest checkpoint of a run.

    Raises:
        UsageError: there is none, or not one of ours.
    """
    try:
        return TorchDistCheckpoint(checkpoint)
    except UsageError as error:
        raise UsageError(f"--checkpoint {checkpoint}: {error}") from error


def tokenizer_record(checkpoint: TorchDistCheckpoint) -> TokenizerSpec:
    """The tokenizer flags that the run was made with.

    Raises:
        UsageError: the checkpoint does not say, as after a conversion.
    """
    if not getattr(checkpoint.args, "tokenizer_type", None):
        raise UsageError(
            f"--checkpoint {checkpoint.folder} does not record a tokenizer: give --tokenizer-type "
            "and its other flags"
        )
    return TokenizerSpec.from_arguments(checkpoint.args)


def tokenizer_flags(spec: TokenizerSpec) -> list[str]:
    """The spec as words of a command line."""
    words: list[str] = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if not value or value == field.default:
            continue
        if field.name == "vocab_size" and spec.tokenizer_type not in TAKE_A_SIZE:
            continue
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        words += [flag_of(field.name), *map(str, values)]
    return words
