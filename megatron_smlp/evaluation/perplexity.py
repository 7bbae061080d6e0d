"""Measure the perplexity of a .bin/.idx pair, or of its validation part: every token but the very
first is predicted exactly once.

    perplexity = exp(nll / tokens),   nll = - sum log p(token | up to T tokens before it)

Windows of T tokens begin every `stride` tokens; each scores what no earlier one did, so with a
stride under T every later token has at least T - stride tokens of context. Documents follow each
other as in training. Per byte and per word the same nll is divided by those of the text. The pair
is read as it is needed: memory holds some windows, whatever its size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_smlp.data.pairs.indexed import Index, open_index, strip_suffix
from megatron_smlp.data.pairs.quick_check import verify_for_training
from megatron_smlp.data.token_counts import counts_in
from megatron_smlp.data.tokenizers.spec import Tokenizer
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.breakdown import Breakdown
from megatron_smlp.evaluation.rows import Row, Scorer

CHUNK = 256
"""Windows that are scored in one call."""


@dataclass(frozen=True)
class Part:
    """Neighbouring sequences of a pair."""

    index: Index
    first: int
    last: int

    def tokens(self) -> Any:
        """Return <dtype>[tokens], on disk until it is read."""
        if self.first == self.last:
            return self.index.tokens[:0]
        begin = int(self.index.pointers[self.first]) // self.index.dtype.itemsize
        end = int(self.index.pointers[self.last - 1]) // self.index.dtype.itemsize
        return self.index.tokens[begin : end + int(self.index.lengths[self.last - 1])]

    def documents(self) -> Iterator[list[int]]:
        """Yield the ids of each document, as far as it belongs to the part."""
        for bounds in itertools.pairwise(self.index.documents.tolist()):
            begin, end = (min(max(bound, self.first), self.last) for bound in bounds)
            if begin < end:
                yield Part(self.index, begin, end).tokens().tolist()


def validation_part(index: Index, split: str | None) -> Part:
    """Return the sequences that a run with that --split validates on; without one, all.

    Raises:
        UsageError: Megatron cannot read it, or it leaves nothing.
    """
    if split is None:
        return Part(index, 0, index.num_sequences)
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    wrong = UsageError(
        f"--split {split}: give the run's shares of training, validation and test, "
        "for example 969,30,1"
    )
    try:
        with np.errstate(invalid="ignore"):
            shares = parse_and_normalize_split(split)
    except (AssertionError, ValueError) as error:
        raise wrong from error
    if any(map(math.isnan, shares)):  # they are all zero, or there is none
        raise wrong
    share = convert_split_vector_to_split_matrix(shares)[1]
    first, last = (round(bound * index.num_sequences) for bound in share or (0, 0))
    if first == last:
        raise UsageError(
            f"--split {split} leaves no document of {index.prefix} for validation: leave it out "
            "to read the whole pair"
        )
    return Part(index, first, last)


def windows(
    tokens: Sequence[int], *, longest: int, stride: int, limit: int | None = None
) -> Iterator[Row]:
    """Cut a text of at least two tokens into rows; see the top of the file.

    Args:
        limit: leave out all but so many, unread. Those left are spread evenly over the text, and
            the first scores no more than the others: with a short stride it would outweigh them.
    """
    last = len(tokens) - 1
    count = 1 + max(0, -(-(last - longest) // stride))
    chosen = min(count, limit or count)
    for number in range(chosen):
        begin = number * count // chosen * stride
        scores_all = begin == 0 and chosen == count
        done = 0 if scores_all else begin - stride + longest  # by the window before
        end = min(begin + longest, last)
        yield Row(tuple(int(token) for token in tokens[begin : end + 1]), end - done)


def measure(
    scorer: Scorer,
    tokenizer: Tokenizer,
    prefix: str,
    *,
    stride: int | None,
    suffix_from: int,
    split: str | None = None,
    limit: int | None = None,
    breaks_down: bool = False,
    allows_mismatch: bool = False,
) -> dict[str, Any]:
    """Return the perplexity of a pair, and the numbers that it is made of. Collective.

    Args:
        stride: tokens between the beginnings of windows; None: T, no overlap.
        suffix_from: P, to report what positions from there on predict too; 0: do not.
        split: the --split of a run, to read only what it validates on.
        limit: windows to score, spread evenly over the text; None: all. Numbers of the text, which
            are per byte and per word, are then left out.
        breaks_down: also return `breakdown`, see evaluation/breakdown.py.
        allows_mismatch: whether the pair may have been written with another tokenizer.

    Raises:
        UsageError: no such pair, one of another vocabulary, or too little text.
    """
    stride = stride or scorer.longest
    if stride > scorer.longest:
        raise UsageError(
            f"--stride {stride} is over the model's {scorer.longest} tokens: the tokens between "
            "windows would be left out; give at most that"
        )
    prefix = strip_suffix(prefix)
    try:
        identity = None if allows_mismatch else tokenizer.identity
        verify_for_training(prefix, identity, vocab_size=tokenizer.vocab_size)
        index = open_index(prefix)
    except (ValueError, OSError) as error:
        raise UsageError(f"--data-path {prefix}: {' '.join(str(error).split())}") from error
    part = validation_part(index, split)
    tokens = part.tokens()
    if len(tokens) < 2:
        raise UsageError(f"--data-path {prefix} has {len(tokens)} tokens: there is none to predict")
    whole: list[float] = []  # -log p, a sum per window
    suffix: list[float] = []
    num_tokens = num_suffix = 0
    cut = windows(tokens, longest=scorer.longest, stride=stride, limit=limit)
    breakdown: Breakdown | None = None
    if breaks_down:
        counts = counts_in(tokens, vocab_size=tokenizer.vocab_size, prefix=prefix)
        breakdown = Breakdown(counts)
    for rows in itertools.batched(cut, CHUNK):
        for row, score in zip(rows, scorer.score(rows), strict=True):
            if breakdown is not None:
                breakdown.add(row, score)
            num_tokens += row.scored
            whole.append(-math.fsum(score.logprobs))
            first = len(row.tokens) - 1 - row.scored  # the position of the first score
            behind = score.logprobs[max(0, suffix_from - first) :] if suffix_from else ()
            suffix.append(-math.fsum(behind))
            num_suffix += len(behind)
    nll = math.fsum(whole)
    result: dict[str, Any] = {"tokens": num_tokens, "nll": nll, "stride": stride}
    result["perplexity"] = math.exp(nll / num_tokens)
    if num_tokens == len(tokens) - 1:
        result |= _of_text(part, tokenizer, nll)
    if num_suffix:
        result["suffix_from"] = suffix_from
        result["suffix_tokens"] = num_suffix
        result["suffix_perplexity"] = math.exp(math.fsum(suffix) / num_suffix)
    if breakdown is not None:
        result["breakdown"] = breakdown.report()
    return result


def _of_text(part: Part, tokenizer: Tokenizer, nll: float) -> dict[str, Any]:
    """Return the perplexity per byte and per word; nothing where ids stand for no text."""
    if tokenizer.identity is None:
        return {}
    encoder = tokenizer.build()
    start = list(getattr(tokenizer, "start", []))  # ids that stand before a text, and for none
    num_bytes = num_words = 0
    for number, ids in enumerate(part.documents()):
        begins = len(start) if ids[: len(start)] == start else 0
        predicted = ids[max(begins, int(number == 0)) :]
        text = encoder.decode([token for token in predicted if token != tokenizer.eod])
        num_bytes += len(text.encode())
        num_words += len(text.split())
    if not num_words:
        return {}
    return {
        "bytes": num_bytes,
        "words": num_words,
        "byte_perplexity": math.exp(nll / num_bytes),
        "word_perplexity": math.exp(min(700.0, nll / num_words)),
    }
