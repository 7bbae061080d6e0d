"""Read the tokenizer that Megatron's flags name, or that a model was trained with."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable

from megatron_smlp.data.tokenizers.bytes_and_numbers import ByteLevel, Null
from megatron_smlp.data.tokenizers.huggingface import from_gpt2_files, from_hub_or_folder
from megatron_smlp.data.tokenizers.sentencepiece_model import SentencePiece
from megatron_smlp.data.tokenizers.spec import (
    SENTENCEPIECE_TYPES,
    TOKENIZER_TYPES,
    Tokenizer,
    TokenizerSpec,
)
from megatron_smlp.data.tokenizers.tiktoken_ranks import TikToken
from megatron_smlp.errors import DataError, UsageError

READERS: dict[str, Callable[[TokenizerSpec], Tokenizer]] = {
    "HuggingFaceTokenizer": from_hub_or_folder,
    "GPT2BPETokenizer": from_gpt2_files,
    **dict.fromkeys(SENTENCEPIECE_TYPES, SentencePiece.from_spec),
    "TikTokenizer": TikToken.from_spec,
    "ByteLevelTokenizer": ByteLevel.from_spec,
    "NullTokenizer": Null.from_spec,
}


def read_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Read the files that the flags name.

    Raises:
        DataError: an unknown type, a missing flag or file, or a damaged file.
    """
    if spec.tokenizer_type not in READERS:
        allowed = ", ".join(TOKENIZER_TYPES)
        raise DataError(f"--tokenizer-type {spec.tokenizer_type} is not one of {allowed}")
    return READERS[spec.tokenizer_type](spec)


def identity_from_arguments(args: argparse.Namespace) -> str | None:
    """Return the identity of the tokenizer that Megatron's flags name; None without a vocabulary.

    Raises:
        DataError: the flags or the files are wrong.
    """
    return read_tokenizer(TokenizerSpec.from_arguments(args)).identity


def strings_of_tokens(args: argparse.Namespace) -> Iterable[tuple[int, bytes]]:
    """Return the ids of the tokenizer that Megatron's flags name, each with its string.

    Raises:
        UsageError: the flags or the files are wrong, or its ids stand for no text.
    """
    try:
        entries = read_tokenizer(TokenizerSpec.from_arguments(args)).entries
    except DataError as error:
        raise UsageError(f"--input-projection minhash needs the tokenizer: {error}.") from error
    if entries is None:
        raise UsageError(
            f"--input-projection minhash hashes token strings, and --tokenizer-type "
            f"{args.tokenizer_type} has none: give a text tokenizer, or omit --input-projection."
        )
    return entries


def bare(spec: TokenizerSpec) -> TokenizerSpec:
    """Return `spec` without special tokens around a text, to continue or score it as it is."""
    return dataclasses.replace(spec, tokenizer_hf_no_include_special_tokens=True)


def resolve_for(
    spec: TokenizerSpec, *, source: str, entries: int, may_be_smaller: bool = False
) -> Tokenizer:
    """Read a tokenizer's files, and leave out the tokens that it puts around a text.

    Args:
        source: the model as the command line names it, for messages.
        entries: size of the vocabulary that the model was trained with.
        may_be_smaller: whether `entries` may include padding.

    Raises:
        UsageError: the files are missing, or contain another vocabulary.
    """
    try:
        tokenizer = read_tokenizer(bare(spec))
    except DataError as error:
        raise UsageError(
            f"{error}. That is the tokenizer of {source}; if it has moved, give "
            "--tokenizer-type and --tokenizer-model (or its other flags)"
        ) from error
    has = tokenizer.vocab_size
    if has > entries or (has < entries and not may_be_smaller):
        raise UsageError(
            f"the tokenizer has {has} entries, but {source} was trained with {entries}: "
            "they do not belong together; give the tokenizer of that run"
        )
    return tokenizer


def start_of(tokenizer: Tokenizer, args: argparse.Namespace | TokenizerSpec) -> list[int]:
    """Return the special ids that the run with these flags put before each text in training."""
    is_bare = getattr(args, "tokenizer_hf_no_include_special_tokens", False)
    return [] if is_bare else list(getattr(tokenizer, "start", []))
