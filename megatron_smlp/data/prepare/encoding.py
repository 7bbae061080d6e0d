"""Turn a chunk of records into flat arrays of ids: the work of one worker process.

Megatron's rules: a sequence without ids is dropped, and the end-of-document id is added to the
last sequence of a document that has ids. A document without ids in every key is counted and left
out; with several keys, an empty one keeps an empty document so that the pairs stay aligned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.pairs.indexed import optimal_dtype
from megatron_smlp.data.prepare.chunks import Chunk
from megatron_smlp.data.prepare.records import Rejection, parse_chunk
from megatron_smlp.data.prepare.sentences import SentenceSettings, Splitter
from megatron_smlp.data.tokenizers.spec import Encoder, Tokenizer, UnencodableTextError
from megatron_smlp.errors import DataError

MAX_LENGTH = int(np.iinfo(np.int32).max)
"""Tokens of a sequence, for which the index has an int32."""
type Document = tuple[int, tuple[str, ...]]
"""Line, and the text of each key."""
type Encoded = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]
"""Ids, lengths of the sequences that have ids, and their number in each document."""


@dataclass(frozen=True)
class EncodingSettings:
    """Everything that decides the ids, beside the text; picklable, as workers get it."""

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    append_eod: bool
    sentences: SentenceSettings | None
    """How documents are split into sentences; None if each document is one sequence."""


@dataclass(frozen=True)
class EncodedKey:
    """Ids of one key of a chunk."""

    ids: NDArray[Any]
    """<uint16 or int32>[tokens]."""
    lengths: NDArray[np.int32]
    """<int32>[sequences], tokens."""
    sequences: NDArray[np.int32]
    """<int32>[documents], sequences of each."""


@dataclass
class EncodedChunk:
    """The documents and rejections of a chunk, as a worker returns them."""

    keys: list[EncodedKey] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    num_documents: int = 0
    num_empty: int = 0


class ChunkEncoder:
    """Encodes chunks with a tokenizer built for this process."""

    def __init__(self, settings: EncodingSettings) -> None:
        self.settings = settings
        self.encoder: Encoder = settings.tokenizer.build()
        self.splitter = Splitter(settings.sentences) if settings.sentences else None
        self.dtype = optimal_dtype(settings.tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        result = EncodedChunk()
        documents: list[Document] = []
        for record in parse_chunk(chunk, self.settings.keys):
            if isinstance(record, Rejection):
                result.rejections.append(record)
            elif any(record[1]):
                documents.append(record)
            else:
                result.num_empty += 1
        chunk.release()
        self._encode_documents(chunk, documents, result)
        return result

    def _encode_documents(
        self, chunk: Chunk, documents: list[Document], result: EncodedChunk
    ) -> None:
        try:
            columns = self._encode_columns(documents)
        except UnencodableTextError:
            unencodable = self._unencodable(documents)
            documents = _without(chunk, documents, unencodable, "not_encodable", result)
            columns = self._encode_columns(documents)
        if too_long := self._too_long(columns):
            documents = _without(chunk, documents, too_long, "too_long", result)
            columns = self._encode_columns(documents)
        used = np.logical_or.reduce([counts > 0 for _, _, counts in columns])
        result.num_empty += int(len(documents) - used.sum())
        result.num_documents = int(used.sum())
        # Empty documents hold no ids and no sequences: only their counts are taken out.
        result.keys = [self._finish(ids, lengths, counts[used]) for ids, lengths, counts in columns]

    def _encode_columns(self, documents: list[Document]) -> list[Encoded]:
        """Encode the texts of each key."""
        numbers = range(len(self.settings.keys))
        return [self._encode_texts([texts[number] for _, texts in documents]) for number in numbers]

    def _encode_texts(self, texts: Sequence[str]) -> Encoded:
        split = self.splitter.split if self.splitter else lambda text: [text]
        parts = [split(text) if text else [] for text in texts]
        sizes = np.fromiter((len(row) for row in parts), dtype=np.int64, count=len(parts))
        if not sizes.any():
            return np.empty(0, np.int64), np.empty(0, np.int64), np.zeros(len(parts), np.int64)
        ids, lengths = self.encoder.encode_batch([part for row in parts for part in row])
        rows = np.repeat(np.arange(len(parts)), sizes)
        counts = np.bincount(rows[lengths > 0], minlength=len(parts))
        return ids, lengths[lengths > 0], counts

    def _too_long(self, columns: list[Encoded]) -> dict[int, str]:
        """Return the documents of which a sequence has more tokens than the format can count with
        its end of document, by their place."""
        found: dict[int, str] = {}
        for _, lengths, counts in columns:
            [sequences] = np.nonzero(lengths > MAX_LENGTH - self.settings.append_eod)
            rows = np.repeat(np.arange(len(counts)), counts)[sequences]
            for row, length in zip(rows.tolist(), lengths[sequences].tolist(), strict=True):
                found[row] = (
                    f"a sequence of {length:,} tokens; the format counts up to {MAX_LENGTH:,}"
                )
        return found

    def _unencodable(self, documents: list[Document]) -> dict[int, str]:
        """Return the documents that the tokenizer refuses, by their place."""
        found: dict[int, str] = {}
        for place, (_, texts) in enumerate(documents):
            try:
                self._encode_texts(texts)
            except UnencodableTextError as error:
                found[place] = str(error)
        return found

    def _finish(
        self, ids: NDArray[Any], lengths: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> EncodedKey:
        max_id = int(ids.max()) if len(ids) else -1
        if max_id >= (size := self.settings.tokenizer.vocab_size):
            raise ids_with_gaps(f"the tokenizer gave id {max_id}, but has {size} entries", size)
        ids = ids.astype(self.dtype)
        if self.settings.append_eod:
            last = np.cumsum(counts)[counts > 0] - 1
            ends = np.cumsum(lengths)[last]
            ids = np.insert(ids, ends, self.dtype.type(self.settings.tokenizer.eod))
            lengths[last] += 1
        return EncodedKey(ids, lengths.astype(np.int32), counts.astype(np.int32))


def ids_with_gaps(what: str, size: int) -> DataError:
    """Return the error of a tokenizer with an id over its number of entries."""
    return DataError(
        f"{what}: its ids have gaps; number its tokens, the added ones too, from 0 to {size - 1}"
    )


def _without(
    chunk: Chunk,
    documents: list[Document],
    rejected: Mapping[int, str],
    reason: str,
    result: EncodedChunk,
) -> list[Document]:
    """Put documents among the rejections, by place and detail, and return the others."""
    for place, detail in rejected.items():
        line, texts = documents[place]
        result.rejections.append(Rejection(chunk.file, line, reason, detail, texts[0][:200]))
    result.rejections.sort(key=lambda rejection: rejection.line)
    return [document for place, document in enumerate(documents) if place not in rejected]
