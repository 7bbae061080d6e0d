"""Measure the perplexity of a .bin/.idx pair, or of its validation part: every token but the first
is predicted exactly once.

    perplexity = exp(nll / tokens),   nll = - sum log p(token | up to T tokens before it)

Windows of T tokens begin every `stride` tokens; each scores the tokens that no earlier one did, so
with a stride below T every later token has at least T - stride tokens of context. Documents follow
each other; MegatronScorer keeps them apart if the training did. Per-byte and per-word figures
divide the same nll by the bytes and words of the predicted text; a subset of windows, which cuts
words, has only per-byte figures:

    bits per byte = nll / (bytes ln 2)

The pair is read on demand: memory holds a few windows, whatever its size.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_smlp.data.pairs.indexed import Index, open_index, strip_suffix
from megatron_smlp.data.pairs.quick_check import verify_for_training
from megatron_smlp.data.token_counts import counts_in
from megatron_smlp.data.tokenizers.spec import Tokenizer
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.breakdown import DOCUMENT, Breakdown
from megatron_smlp.evaluation.rows import Row, Scorer

BEFORE = 16
"""Tokens decoded ahead of a piece of text, as characters and words may span its edge."""
CHUNK = 256
"""Windows scored in one call."""
BYTE_TOKEN = re.compile(rb"<0x[0-9A-F]{2}>")
"""A token of byte fallback, as Llama 2's vocabulary spells it."""
LETTER = b"<0x61>"
"""That of the letter a."""


class Part(NamedTuple):
    """Consecutive sequences of a pair."""

    tokens: Any
    """<dtype>[tokens], on disk until it is read."""
    documents: Any
    """int64[documents + 1]: the offset in `tokens` of each document's first token."""

    @classmethod
    def of(cls, index: Index, first: int, last: int) -> Part:
        ends = np.concatenate([[0], np.cumsum(index.lengths[first:last], dtype=np.int64)])
        bounds = np.clip(index.documents, first, last) - first
        return cls(index.tokens_of(first, last), np.unique(ends[bounds]))


def validation_part(index: Index, split: str | None) -> Part:
    """Return the sequences that a run with this --split validates on; without one, all.

    Raises:
        UsageError: Megatron cannot parse it, or it leaves nothing for validation.
    """
    if split is None:
        return Part.of(index, 0, index.num_sequences)
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    try:
        share = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[1]
        first, last = (round(bound * index.num_sequences) for bound in share or (0, 0))
    except (AssertionError, ValueError) as error:
        raise UsageError(
            f"--split {split}: give the run's shares of training, validation and test, for "
            "example 969,30,1"
        ) from error
    if first == last:
        raise UsageError(
            f"--split {split} leaves no document of {index.prefix} for validation: omit it "
            "to read the whole pair"
        )
    return Part.of(index, first, last)


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text; those from `scored` on are predicted."""

    begin: int
    scored: int
    end: int
    """One past the last token."""

    def row(self, tokens: Sequence[int]) -> Row:
        ids = tokens[self.begin : self.end]
        return Row(tuple(int(token) for token in ids), self.end - self.scored)


def windows(count: int, *, longest: int, stride: int, limit: int | None = None) -> Iterator[Window]:
    """Cut a text of `count` tokens, two or more, into windows; see the top of the file.

    Args:
        limit: read only so many, spread evenly over the text. The first of them scores no more than
            the others: with a short stride it would outweigh them.
    """
    last = count - 1
    all_of_them = 1 + max(0, -(-(last - longest) // stride))
    chosen = min(all_of_them, limit or all_of_them)
    for number in range(chosen):
        begin = number * all_of_them // chosen * stride
        scores_all = begin == 0 and chosen == all_of_them
        done = 0 if scores_all else begin - stride + longest  # scored by the previous window
        yield Window(begin, done + 1, min(begin + longest, last) + 1)


def measure(
    scorer: Scorer, tokenizer: Tokenizer, options: argparse.Namespace, *, suffix_from: int
) -> dict[str, Any]:
    """Return the perplexity of --data-path, and the numbers it is computed from. Collective.

    Args:
        options: those of the group `perplexity` in cli.py, and --limit.
        suffix_from: P, to also report what positions from P on predict; 0: do not.

    Raises:
        UsageError: there is no such pair, its vocabulary differs, or it has too little text.
    """
    stride = options.stride or scorer.longest
    if stride > scorer.longest:
        raise UsageError(
            f"--stride {stride} exceeds the model's {scorer.longest} tokens: the tokens between "
            "windows would be skipped; give at most that"
        )
    part = _part(tokenizer, options)
    tokens = part.tokens
    whole, suffix = _Sum(), _Sum()
    cut = windows(len(tokens), longest=scorer.longest, stride=stride, limit=options.limit)
    text = _Text(part, tokenizer) if tokenizer.identity is not None else None
    breakdown: Breakdown | None = None
    if options.breakdown:
        counts = counts_in(tokens, vocab_size=tokenizer.vocab_size, prefix=options.data_path)
        breakdown = Breakdown(counts, part.documents)
    for some in itertools.batched(cut, CHUNK):
        rows = [window.row(tokens) for window in some]
        for window, row, score in zip(some, rows, scorer.score(rows), strict=True):
            if text is not None:
                text.count(window)
            if breakdown is not None:
                breakdown.add(row, score, place=window.scored)
            whole.add(score.logprobs)
            first = len(row.tokens) - 1 - row.scored  # the position of the first score
            suffix.add(score.logprobs[max(0, suffix_from - first) :] if suffix_from else ())
    nll = whole.nll
    result: dict[str, Any] = {"tokens": whole.count, "nll": nll, "stride": stride}
    result["perplexity"] = math.exp(nll / whole.count)
    if text and (num_bytes := int(text.bytes.sum())):
        result |= _per_byte(nll, num_bytes)
    if text and whole.count == len(tokens) - 1 and (num_words := text.words()):
        result |= {"words": num_words, "word_perplexity": math.exp(min(700.0, nll / num_words))}
    if suffix.count:
        result |= {"suffix_from": suffix_from, "suffix_tokens": suffix.count}
        result["suffix_perplexity"] = math.exp(suffix.nll / suffix.count)
    if breakdown is not None:
        result["breakdown"] = breakdown.report()
        for document in result["breakdown"].get(DOCUMENT, ()):
            if text and (num_bytes := int(text.bytes[int(document["label"]) - 1])):
                document |= _per_byte(document["loss"] * document["tokens"], num_bytes)
    return result


class _Sum:
    """Accumulates -log p of tokens, as one sum per window."""

    def __init__(self) -> None:
        self.count, self._sums = 0, list[float]()

    def add(self, logprobs: Sequence[float]) -> None:
        self.count += len(logprobs)
        self._sums.append(-math.fsum(logprobs))

    @property
    def nll(self) -> float:
        return math.fsum(self._sums)


def _part(tokenizer: Tokenizer, options: argparse.Namespace) -> Part:
    """Open the part of a pair to read, and check that it has two tokens or more."""
    prefix = strip_suffix(options.data_path)
    try:
        identity = None if options.allow_tokenizer_mismatch else tokenizer.identity
        verify_for_training(prefix, identity, vocab_size=tokenizer.vocab_size)
        index = open_index(prefix)
    except (ValueError, OSError) as error:
        raise UsageError(f"--data-path {prefix}: {' '.join(str(error).split())}") from error
    part = validation_part(index, options.split)
    if (count := len(part.tokens)) < 2:
        raise UsageError(f"--data-path {prefix} has {count} tokens: none to predict")
    return part


def _per_byte(nll: float, num_bytes: int) -> dict[str, Any]:
    bits = nll / num_bytes / math.log(2)
    return {"bytes": num_bytes, "bits_per_byte": bits, "byte_perplexity": 2**bits}


class _Text:
    """The decoded text of a part, without the ids that begin and end documents."""

    def __init__(self, part: Part, tokenizer: Tokenizer) -> None:
        self._encoder, self._end = tokenizer.build(), tokenizer.eod
        self._start = list(getattr(tokenizer, "start", []))
        # Decoders drop or replace all bytes of a run that begins or ends within a character. For
        # sizes, each is read as a letter instead, which has one byte too.
        fallback = {text: i for i, text in tokenizer.entries or () if BYTE_TOKEN.fullmatch(text)}
        self._letters = (
            dict.fromkeys(fallback.values(), fallback[LETTER]) if LETTER in fallback else {}
        )
        self._tokens = part.tokens
        self._documents = part.documents
        self.bytes = np.zeros(len(self._documents) - 1, dtype=np.int64)
        """Bytes of each document predicted so far."""

    def count(self, window: Window) -> None:
        """Count the bytes that a window predicts; a character counts with its last token, except
        one of byte fallback, whose bytes are tokens."""
        first = max(0, int(np.searchsorted(self._documents, window.scored, side="right")) - 1)
        last = int(np.searchsorted(self._documents, window.end))
        bounds = itertools.pairwise(self._documents[first : last + 1].tolist())
        for document, (begin, end) in enumerate(bounds, start=first):
            begin = self._behind_start(begin, end)
            low, high = max(begin, window.scored), min(end, window.end)
            if low < high:
                before = max(begin, low - BEFORE)
                self.bytes[document] += self._size(before, high) - self._size(before, low)

    def words(self) -> int:
        """Return the number of words of the whole part, without its unpredicted first token."""
        bounds = itertools.pairwise(self._documents.tolist())
        spans = ((max(1, self._behind_start(begin, end)), end) for begin, end in bounds)
        texts = (self._decoded(self._tokens[begin:end].tolist()) for begin, end in spans)
        return sum(len(text.split()) for text in texts)

    def _behind_start(self, begin: int, end: int) -> int:
        behind = begin + len(self._start)
        starts = behind <= end and self._tokens[begin:behind].tolist() == self._start
        return behind if starts else begin

    def _size(self, begin: int, end: int) -> int:
        ids = [self._letters.get(token, token) for token in self._tokens[begin:end].tolist()]
        return len(self._decoded(ids).rstrip("\ufffd").encode())

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._encoder.decode([token for token in ids if token != self._end])
        return text
