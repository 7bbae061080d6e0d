"""A checkpoint's own record of its model and tokenizer -> flags that build both again."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.conversion.torch_dist import TorchDistCheckpoint
from megatron_smlp.data.errors import DataError
from megatron_smlp.data.tokenizers import Tokenizer, TokenizerSpec
from megatron_smlp.errors import UsageError
from megatron_smlp.training.checkpoints import (
    LAYOUT_DEPENDENT,
    MAY_CHANGE,
)

# They follow from other flags, or from the tokenizer.
DERIVED = ("moe_router_topk", "vocab_size", "max_position_embeddings")
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


def model_flags(parser: argparse.ArgumentParser, flags: dict[str, Any]) -> list[str]:
    """model.json as words of a command line, without what only training reads."""
    skipped = {*LAYOUT_DEPENDENT, *MAY_CHANGE, *DERIVED}
    words: list[str] = []
    for name, value in flags.items():
        if name not in skipped and value is not None:
            actions = [action for action in parser._actions if action.dest == name]
            words += _words(actions, value)
    return words


def _words(actions: Sequence[argparse.Action], value: Any) -> Iterator[str]:
    for action in actions:
        option = action.option_strings[0]
        if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
            if action.const == value and action.default != value:
                yield option
        elif isinstance(action, argparse.BooleanOptionalAction):
            yield option if value else option.replace("--", "--no-", 1)
        elif value != action.default:
            yield f"{option}={str(value).replace(' ', '')}"
