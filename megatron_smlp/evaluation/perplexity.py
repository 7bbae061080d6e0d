"""Perplexity of a whole .bin/.idx pair: every token but the very first is predicted exactly once.

    perplexity = exp(nll / tokens),   nll = - sum log p(token | up to T tokens before it)

Windows of T tokens begin every `stride` tokens; each scores what no earlier one did, so with a
stride under T every later token has at least T - stride tokens of context. Documents follow each
other as in training. Per byte and per word the same nll is divided by those of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_smlp.data.indexed import Index, open_index, strip_suffix
from megatron_smlp.data.tokenizers import Tokenizer
from megatron_smlp.data.verification import verify_for_training
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.scoring import Row, Scorer


@dataclass(frozen=True)
class Window:
    """One row, and the position in it of the first token that is predicted anew."""

    row: Row
    first: int


def windows(tokens: Sequence[int], *, longest: int, stride: int) -> list[Window]:
    """Cut a text of at least two tokens; see the top of the file."""
    made, done = [], 0
    for begin in range(0, len(tokens) - 1, stride):
        end = min(begin + longest, len(tokens) - 1)
        if end > done:
            row = Row(tuple(int(token) for token in tokens[begin : end + 1]), end - done)
            made.append(Window(row, done - begin))
        done = end
        if end == len(tokens) - 1:
            break
    return made


def measure(
    scorer: Scorer, tokenizer: Tokenizer, prefix: str, *, stride: int | None, suffix_from: int
) -> dict[str, Any]:
    """Score a pair. Collective.

    Args:
        stride: tokens between the beginnings of windows; None: T, no overlap.
        suffix_from: P of partial prediction, to report the positions behind it too; 0: do not.

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
        verify_for_training(prefix, tokenizer.identity, vocab_size=tokenizer.vocab_size)
        index = open_index(prefix)
    except (ValueError, OSError) as error:
        raise UsageError(f"--data-path {prefix}: {' '.join(str(error).split())}") from error
    documents = [index.document(number) for number in range(index.num_documents)]
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=index.dtype)
    if len(tokens) < 2:
        raise UsageError(f"--data-path {prefix} has {len(tokens)} tokens: there is none to predict")
    cut = windows(tokens.tolist(), longest=scorer.longest, stride=stride)
    scores = scorer.score([window.row for window in cut])
    nll = -math.fsum(value for score in scores for value in score.logprobs)
    result: dict[str, Any] = {"tokens": len(tokens) - 1, "nll": nll, "stride": stride}
    result["perplexity"] = math.exp(nll / result["tokens"])
    result |= _of_text(index, tokenizer, nll)
    if suffix_from:
        behind = [
            value
            for window, score in zip(cut, scores, strict=True)
            for place, value in enumerate(score.logprobs, start=window.first)
            if place >= suffix_from
        ]
        if behind:
            result["suffix_tokens"] = len(behind)
            result["suffix_perplexity"] = math.exp(-math.fsum(behind) / len(behind))
    return result


def _of_text(index: Index, tokenizer: Tokenizer, nll: float) -> dict[str, Any]:
    """Per byte and per word of the predicted text; nothing where ids stand for no text."""
    if tokenizer.identity is None:
        return {}
    encoder = tokenizer.build()
    num_bytes = num_words = 0
    for number in range(index.num_documents):
        ids = index.document(number).tolist()[1 if number == 0 else 0 :]  # the first is not scored
        text = encoder.decode([token for token in ids if token != tokenizer.eod])
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
