"""The tokenizer that Megatron's flags name, from its files."""

import argparse
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
    """Return the identity of the tokenizer that Megatron's flags name; None for no vocabulary.

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
        raise UsageError(f"--input-projection minhash reads the tokenizer: {error}.") from error
    if entries is None:
        raise UsageError(
            f"--input-projection minhash hashes the strings of tokens, and --tokenizer-type "
            f"{args.tokenizer_type} has none: give the tokenizer of a text, or leave "
            "--input-projection out."
        )
    return entries
