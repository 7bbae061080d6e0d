"""A checkpoint's own record of its model and tokenizer -> flags that build both again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_smlp.conversion.torch_dist import TorchDistCheckpoint
from megatron_smlp.data.errors import DataError
from megatron_smlp.data.tokenizers import Tokenizer, TokenizerSpec
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


def resolve_for(spec: TokenizerSpec, flags: dict[str, Any], checkpoint: str | Path) -> Tokenizer:
    """Read a tokenizer's files, and check that the model was trained with as many entries.

    Raises:
        UsageError: the files are missing, or hold another vocabulary.
    """
    try:
        tokenizer = bare(spec).resolve()
    except DataError as error:
        raise UsageError(
            f"{error}. That is the tokenizer of --checkpoint {checkpoint}; where it has moved, "
            "give --tokenizer-type and --tokenizer-model (or its other flags)"
        ) from error
    if tokenizer.vocab_size != flags["vocab_size"]:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} entries and --checkpoint {checkpoint} was "
            f"trained with {flags['vocab_size']}: give the tokenizer of that run"
        )
    return tokenizer


def bare(spec: TokenizerSpec) -> TokenizerSpec:
    """Options are scored as they are, without the tokens that a tokenizer puts around a text."""
    return dataclasses.replace(spec, tokenizer_hf_no_include_special_tokens=True)


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
        words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    return words
