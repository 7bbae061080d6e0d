"""The tokenizer that Megatron's flags name, from its files."""

import argparse
from collections.abc import Callable

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
from megatron_smlp.errors import DataError

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
