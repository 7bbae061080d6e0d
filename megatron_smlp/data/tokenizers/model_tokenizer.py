"""The tokenizer of a trained model: its files are read, and its vocabulary compared."""

from __future__ import annotations

import argparse
import dataclasses

from megatron_smlp.data.tokenizers.factory import read_tokenizer
from megatron_smlp.data.tokenizers.spec import Tokenizer, TokenizerSpec
from megatron_smlp.errors import DataError, UsageError


def bare(spec: TokenizerSpec) -> TokenizerSpec:
    """Return the same without special tokens around a text, which goes on or is scored as it is."""
    return dataclasses.replace(spec, tokenizer_hf_no_include_special_tokens=True)


def resolve_for(
    spec: TokenizerSpec, *, source: str, entries: int, may_be_smaller: bool = False
) -> Tokenizer:
    """Read a tokenizer's files, without the tokens that it puts around a text.

    Args:
        source: the model as the command line names it, for messages.
        entries: of the vocabulary that the model was trained with.
        may_be_smaller: whether `entries` may count padding.

    Raises:
        UsageError: the files are missing, or hold another vocabulary.
    """
    try:
        tokenizer = read_tokenizer(bare(spec))
    except DataError as error:
        raise UsageError(
            f"{error}. That is the tokenizer of {source}; where it has moved, give "
            "--tokenizer-type and --tokenizer-model (or its other flags)"
        ) from error
    has = tokenizer.vocab_size
    if has > entries or (has < entries and not may_be_smaller):
        raise UsageError(
            f"the tokenizer has {has} entries and {source} was trained with {entries}: they do not "
            "belong together; give the tokenizer of that run"
        )
    return tokenizer


def start_of(tokenizer: Tokenizer, args: argparse.Namespace | TokenizerSpec) -> list[int]:
    """Return the special ids before a text, as the run of these flags was trained with."""
    is_bare = getattr(args, "tokenizer_hf_no_include_special_tokens", False)
    return [] if is_bare else list(getattr(tokenizer, "start", []))
