"""Tokenizers that are not of the Hugging Face kind: SentencePiece, tiktoken, bytes, numbers."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.errors import DataError, require_package
from megatron_smlp.data.tokenizers.gigatoken_encoder import GigatokenEncoder, gigatoken_in_place_of
from megatron_smlp.data.tokenizers.spec import (
    Encoder,
    TokenizerSpec,
    UnencodableTextError,
    vocabulary_identity,
)

# Split patterns of Megatron's TikTokenizer, `--tiktoken-pattern`; public in its source, and part
# of the meaning of the ids.
TIKTOKEN_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TIKTOKEN_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
TIKTOKEN_DEFAULT_VOCABULARY = 2**17
BYTE_LEVEL_VOCABULARY = 512
NUM_BYTES = 256


def _flatten(rows: list[list[int]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    flat = np.fromiter((number for row in rows for number in row), np.int64, int(lengths.sum()))
    return flat, lengths


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece `.model`; neither BOS nor EOS is put around a text, as in Megatron."""

    model: bytes
    description: str = "sentencepiece"

    @classmethod
    def from_spec(cls, spec: TokenizerSpec) -> "SentencePiece":
        require_package("sentencepiece", purpose=spec.tokenizer_type, extra="sentencepiece")
        path = spec.existing_file("tokenizer_model")
        if spec.tokenizer_sentencepiece_legacy or spec.tokenizer_special_tokens:
            raise DataError(
                "--tokenizer-sentencepiece-legacy and --tokenizer-special-tokens are not supported "
                "for SentencePiece; train the model with its special tokens in it"
            )
        try:
            tokenizer = cls(path.read_bytes())
            tokenizer.processor.get_piece_size()
        except RuntimeError:
            raise DataError(f"--tokenizer-model {path} is no SentencePiece model") from None
        return tokenizer

    @cached_property
    def processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self.model)
        return processor

    @property
    def vocab_size(self) -> int:
        return int(self.processor.get_piece_size())

    @property
    def eod(self) -> int | None:
        eos = self.processor.eos_id()
        return eos if eos >= 0 else None

    @property
    def identity(self) -> str:
        piece = self.processor.id_to_piece
        return vocabulary_identity((i, piece(i).encode()) for i in range(self.vocab_size))

    def build(self) -> Encoder:
        # gigatoken reads the names of control pieces, which SentencePiece takes for plain text.
        fast = gigatoken_in_place_of(
            self,
            lambda gigatoken: gigatoken.Tokenizer.from_sentencepiece(self.model),
            slow_strings=self._names_of_control_pieces(),
        )
        if isinstance(fast, GigatokenEncoder):
            return fast
        return replace(self, description=f"sentencepiece ({fast})")

    def _names_of_control_pieces(self) -> list[str]:
        processor = self.processor
        numbers = range(self.vocab_size)
        special = (i for i in numbers if processor.is_control(i) or processor.is_unknown(i))
        return [processor.id_to_piece(i) for i in special]

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return _flatten([self.processor.encode_as_ids(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.decode_ids([int(number) for number in ids]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)


@dataclass(frozen=True)
class TikToken:
    """tiktoken ranks numbered behind the special tokens, as Megatron's TikTokenizer does."""

    ranks: tuple[bytes, ...]
    """Token bytes by rank."""
    special: tuple[str, ...]
    pattern: str
    description: str = "tiktoken"

    @classmethod
    def from_spec(cls, spec: TokenizerSpec) -> "TikToken":
        require_package("tiktoken", purpose="TikTokenizer", extra="tiktoken")
        path = spec.existing_file("tokenizer_model")
        named = spec.tokenizer_special_tokens or TIKTOKEN_SPECIAL_TOKENS
        count = spec.tiktoken_num_special_tokens
        if not set(TIKTOKEN_SPECIAL_TOKENS) <= set(named) or len(named) > count:
            raise DataError(
                f"--tokenizer-special-tokens must hold {' '.join(TIKTOKEN_SPECIAL_TOKENS)}, and at "
                f"most --tiktoken-num-special-tokens {count} tokens; it has {len(named)}"
            )
        filler = (f"<SPECIAL_{number}>" for number in range(len(named), count))
        ranks = _read_ranks(path)
        wanted = (spec.vocab_size or TIKTOKEN_DEFAULT_VOCABULARY) - count
        if not 0 < wanted <= len(ranks):
            raise DataError(
                f"--vocab-size {wanted + count} needs {wanted} ranks and {count} special tokens, "
                f"but {path} has {len(ranks)}; give --vocab-size {len(ranks) + count} or less"
            )
        pattern = TIKTOKEN_PATTERNS[spec.tiktoken_pattern or "v2"]
        return cls(tuple(ranks[:wanted]), (*named, *filler), pattern)

    @cached_property
    def encoding(self) -> Any:
        import tiktoken

        shift = len(self.special)
        return tiktoken.Encoding(
            name="megatron",
            pat_str=self.pattern,
            mergeable_ranks={token: rank + shift for rank, token in enumerate(self.ranks)},
            special_tokens={token: number for number, token in enumerate(self.special)},
        )

    @property
    def vocab_size(self) -> int:
        return len(self.special) + len(self.ranks)

    @property
    def eod(self) -> int | None:
        return self.special.index("</s>")

    @property
    def identity(self) -> str:
        tokens = [*(token.encode() for token in self.special), *self.ranks]
        return vocabulary_identity(enumerate(tokens))

    def build(self) -> Encoder:
        return self

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return _flatten([self.encoding.encode(text, allowed_special="all") for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.encoding.decode([int(number) for number in ids]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.ranks, self.special, self.pattern)


def _read_ranks(path: Path) -> list[bytes]:
    """Token bytes by rank: Megatron's JSON list, or OpenAI's `.tiktoken` lines."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows: list[Any] = [(row["token_bytes"], row["rank"]) for row in json.loads(text)]
        else:
            rows = [line.split() for line in text.splitlines() if line]
        pairs = sorted((int(rank), base64.b64decode(token)) for token, rank in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--tokenizer-model {path} holds no tiktoken ranks: {error}") from None
    if [rank for rank, _ in pairs] != list(range(len(pairs))):
        raise DataError(f"--tokenizer-model {path}: the ranks must run from 0 without a gap")
    return [token for _, token in pairs]


@dataclass(frozen=True)
class ByteLevel:
    """UTF-8 bytes as ids; as in Megatron, EOS is 0, a byte that no text contains by accident."""

    vocab_size: int
    eod: int | None = 0
    description: str = "bytes"

    @classmethod
    def from_spec(cls, spec: TokenizerSpec) -> "ByteLevel":
        size = BYTE_LEVEL_VOCABULARY if spec.vocab_size is None else spec.vocab_size
        if size < NUM_BYTES:
            raise DataError(f"--vocab-size {size}: ByteLevelTokenizer needs at least {NUM_BYTES}")
        return cls(size)

    @property
    def identity(self) -> str:
        return vocabulary_identity((number, bytes([number])) for number in range(NUM_BYTES))

    def build(self) -> Encoder:
        return self

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        rows = [text.encode() for text in texts]
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        return np.frombuffer(b"".join(rows), dtype=np.uint8), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(number for number in ids if number < NUM_BYTES).decode(errors="replace")


@dataclass(frozen=True)
class Null:
    """Texts that are numbers already, separated by single spaces."""

    vocab_size: int
    eod: int | None
    identity: None = None
    description: str = "numbers"

    @classmethod
    def from_spec(cls, spec: TokenizerSpec) -> "Null":
        size = spec.vocab_size
        if size is None or size < 1:
            raise DataError(f"NullTokenizer needs --vocab-size of 1 or more, got {size}")
        eod = spec.null_tokenizer_eod_id
        return cls(size, size - 1 if eod is None else eod)

    def build(self) -> Encoder:
        return self

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return _flatten([self._numbers(text) for text in texts])

    def _numbers(self, text: str) -> list[int]:
        try:
            ids = [int(part) for part in text.split(" ")]
        except ValueError as error:
            raise UnencodableTextError(f"not a list of numbers: {error}") from None
        outside = [number for number in ids if not 0 <= number < self.vocab_size]
        if outside:
            raise UnencodableTextError(f"id {outside[0]} is not in 0 to {self.vocab_size - 1}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(number) for number in ids)
