"""Tokenizers without a vocabulary file: UTF-8 bytes, and texts that are numbers already."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.tokenizers.ids import join_ids
from megatron_smlp.data.tokenizers.spec import (
    Encoder,
    TokenizerSpec,
    UnencodableTextError,
    WithTexts,
)
from megatron_smlp.errors import DataError

BYTE_LEVEL_VOCABULARY = 512
NUM_BYTES = 256


@dataclass(frozen=True)
class ByteLevel(WithTexts):
    """UTF-8 bytes as ids; as in Megatron, EOS is 0, a byte that no text contains by accident."""

    vocab_size: int
    eod: int | None = 0
    description: str = "bytes"

    @classmethod
    def from_spec(cls, spec: TokenizerSpec) -> "ByteLevel":
        return cls(spec.vocab_size or BYTE_LEVEL_VOCABULARY)

    @property
    def entries(self) -> list[tuple[int, bytes]]:
        return [(number, bytes([number])) for number in range(NUM_BYTES)]

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
    entries: None = None
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
        return join_ids([self._numbers(text) for text in texts])

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
