"""Turn a chunk of records into flat arrays of ids: the work of one worker process.

Megatron's rules: a sequence without ids is dropped, and the end-of-document id is added to the
last sequence of a document that has ids. A document without ids in any key is counted and left
out; with several keys, an empty one keeps an empty document so that the pairs stay aligned.
"""

from collections.abc import Sequence
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

type Document = tuple[int, tuple[str, ...]]
"""Line number, and the text of each key."""
type Encoded = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]
"""Ids, lengths of the sequences that have ids, and their number in each document."""


@dataclass(frozen=True)
class EncodingSettings:
    """Everything besides the text that determines the ids; picklable, to be sent to workers."""

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
    """<int32>[sequences], tokens of each."""
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
        chunk.payload.clear()  # one record alone may fill a gigabyte
        self._encode_documents(chunk, documents, result)
        return result

    def _encode_documents(
        self, chunk: Chunk, documents: list[Document], result: EncodedChunk
    ) -> None:
        try:
            columns = self._encode_columns(documents)
        except UnencodableTextError:
            problems = {line: self._problem(texts) for line, texts in documents}
            result.rejections += [
                Rejection(chunk.file, line, "not_encodable", problems[line], texts[0][:200])
                for line, texts in documents
                if problems[line]
            ]
            result.rejections.sort(key=lambda rejection: rejection.line)
            documents = [(line, texts) for line, texts in documents if not problems[line]]
            columns = self._encode_columns(documents)
        used = np.logical_or.reduce([counts > 0 for _, _, counts in columns])
        result.num_empty += int(len(documents) - used.sum())
        result.num_documents = int(used.sum())
        # Empty documents have no ids and no sequences: only their counts have to be removed.
        result.keys = [self._finish(ids, lengths, counts[used]) for ids, lengths, counts in columns]

    def _problem(self, texts: Sequence[str]) -> str:
        """Return why the tokenizer cannot encode these texts, or "" if it can."""
        try:
            self._encode_texts(texts)
        except UnencodableTextError as error:
            return str(error)
        return ""

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

    def _finish(
        self, ids: NDArray[Any], lengths: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> EncodedKey:
        eod = self.settings.tokenizer.eod
        if self.settings.append_eod and eod is not None:
            last = np.cumsum(counts)[counts > 0] - 1
            ends = np.cumsum(lengths)[last]
            ids = np.insert(ids.astype(np.int64), ends, eod)
            lengths[last] += 1
        if len(ids) and (max_id := ids.max()) >= (size := self.settings.tokenizer.vocab_size):
            raise DataError(
                f"the tokenizer gave id {max_id}, but has {size} entries: its ids have gaps; "
                f"number its tokens, the added ones too, from 0 to {size - 1}"
            )
        return EncodedKey(ids.astype(self.dtype), lengths.astype(np.int32), counts.astype(np.int32))
