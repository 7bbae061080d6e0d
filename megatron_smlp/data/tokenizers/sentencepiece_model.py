"""SentencePiece models."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.tokenizers.gigatoken_encoder import gigatoken_in_place_of
from megatron_smlp.data.tokenizers.ids import join_ids, within
from megatron_smlp.data.tokenizers.spec import Encoder, TokenizerSpec, WithTexts
from megatron_smlp.errors import DataError


@dataclass(frozen=True)
class SentencePiece(WithTexts):
    """A SentencePiece `.model`; as in Megatron, texts get neither BOS nor EOS."""

    model: bytes
    description: str = "sentencepiece"

    @classmethod
    def from_spec(cls, spec: TokenizerSpec) -> "SentencePiece":
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
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        kinds = ModelProto.SentencePiece
        pieces = ModelProto.FromString(self.model).pieces
        by_rules = (kinds.USER_DEFINED, kinds.UNUSED, kinds.BYTE)
        # gigatoken recognizes the names of control pieces; for SentencePiece they are plain text.
        special = (kinds.CONTROL, kinds.UNKNOWN)
        return gigatoken_in_place_of(
            self,
            lambda gigatoken: gigatoken.Tokenizer.from_sentencepiece(self.model),
            # A piece spells a space as U+2581.
            pieces=[p.piece.replace("\u2581", " ") for p in pieces if p.type in by_rules],
            slow_strings=[p.piece for p in pieces if p.type in special],
        )

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return join_ids([self.processor.encode_as_ids(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.decode_ids(within(ids, self.vocab_size)))
