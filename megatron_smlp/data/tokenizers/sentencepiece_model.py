"""SentencePiece models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.tokenizers.gigatoken_encoder import GigatokenEncoder, gigatoken_in_place_of
from megatron_smlp.data.tokenizers.ids import join_ids, within
from megatron_smlp.data.tokenizers.spec import Encoder, TokenizerSpec, WithTexts
from megatron_smlp.errors import DataError, require_package

PIECE_KEY = 1 << 3 | 2
USER_DEFINED = bytes([3 << 3, 4])


@dataclass(frozen=True)
class SentencePiece(WithTexts):
    """A SentencePiece `.model`; neither BOS nor EOS is put around a text, as in Megatron."""

    model: bytes
    description: str = "sentencepiece"

    @classmethod
    def from_spec(cls, spec: TokenizerSpec) -> "SentencePiece":
        require_package("sentencepiece", purpose=spec.tokenizer_type, extra="sentencepiece")
        path = spec.existing_file("tokenizer_model")
        if spec.tokenizer_special_tokens:
            raise DataError(
                "--tokenizer-special-tokens is not supported for SentencePiece; train the model "
                "with its special tokens in it"
            )
        try:
            tokenizer = cls(path.read_bytes())
            tokenizer.processor.get_piece_size()
        except RuntimeError:
            raise DataError(f"--tokenizer-model {path} is not a SentencePiece model") from None
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
    def entries(self) -> list[tuple[int, bytes]]:
        piece = self.processor.id_to_piece
        return [(i, piece(i).encode()) for i in range(self.vocab_size)]

    def build(self) -> Encoder:
        processor, numbers = self.processor, range(self.vocab_size)
        special = (i for i in numbers if processor.is_control(i) or processor.is_unknown(i))
        other = (i for i in numbers if processor.is_unused(i) or processor.is_byte(i))
        # gigatoken reads the names of control pieces, which SentencePiece takes for plain text.
        fast = gigatoken_in_place_of(
            self,
            lambda gigatoken: gigatoken.Tokenizer.from_sentencepiece(self.model),
            # A piece spells a space as U+2581.
            pieces=[
                processor.id_to_piece(i).replace("\u2581", " ")
                for i in (*_user_defined(self.model), *other)
            ],
            slow_strings=[processor.id_to_piece(i) for i in special],
        )
        if isinstance(fast, GigatokenEncoder):
            return fast
        return replace(self, description=f"sentencepiece ({fast})")

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return join_ids([self.processor.encode_as_ids(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.decode_ids(within(ids, self.vocab_size)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)


def _user_defined(model: bytes) -> Iterator[int]:
    """Yield the ids of the pieces of the type USER_DEFINED, which the library does not tell.

    The file is a protobuf message: each field is a key and a size, as varints, and that many bytes.
    Field 1 is a piece, whose field 3 is its type. Another piece may hold the same two bytes in its
    text or score, and is then among them.
    """
    number = at = 0
    while at < len(model):
        key, at = _varint(model, at)
        size, at = _varint(model, at)
        if key == PIECE_KEY:
            if USER_DEFINED in model[at : at + size]:
                yield number
            number += 1
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at`, of seven bits a byte, and the place behind it."""
    end = at
    while data[end] >= 128:
        end += 1
    return sum((data[i] & 127) << 7 * (i - at) for i in range(at, end + 1)), end + 1
