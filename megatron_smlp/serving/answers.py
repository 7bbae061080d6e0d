"""An answer while it grows: its text, where it ends, and how the API writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_smlp.generation.language_model import LanguageModel
from megatron_smlp.serving.engine import Token

CONTEXT = 16
"""Tokens of the prompt that are decoded with an answer, for blanks and split characters."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a tokenizer shows bytes that are no whole character yet."""


class Answer:
    """Tokens of one answer, as text up to the first stop text."""

    def __init__(self, lm: LanguageModel, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.lm, self.prompt, self.stops = lm, prompt[-CONTEXT:], stops
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason = "length"
        self.num_told = 0
        self.held_back = max(map(len, stops), default=1) - 1

    def push(self, token: Token) -> bool:
        """Take a token; whether the answer ends with it."""
        if token.id == self.lm.end:
            self.finish_reason = "stop"
            return True
        before = max(0, len(self.text) - self.held_back - 1)
        self.ids.append(token.id)
        self.text = self.lm.continuation(self.prompt, self.ids)
        found = [place for stop in self.stops if (place := self.text.find(stop, before)) >= 0]
        if found:
            self.text, self.finish_reason = self.text[: min(found)], "stop"
        return bool(found)

    def news(self, *, ended: bool) -> str:
        """Text that has not been told yet and that no later token changes."""
        safe = len(self.text)
        if not ended:
            safe = len(self.text.rstrip(UNFINISHED)) - self.held_back
        new = self.text[self.num_told : max(safe, self.num_told)]
        self.num_told += len(new)
        return new


def choice(
    index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }


def logprobs_of(lm: LanguageModel, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """The API's four lists, an entry per token; offsets count the tokens' own texts from `offset`.

    The end-of-document token has its entry, though the text is without it.
    """
    names = [lm.decode([token.id]) for token in tokens]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    return {
        "tokens": names,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_named(lm, token.top) for token in tokens],
        "text_offset": offsets,
    }


def _named(lm: LanguageModel, top: dict[int, float] | None) -> dict[str, float] | None:
    """By the tokens' texts; of two with one text, parts of a character, the second by its id."""
    if top is None:
        return None
    named: dict[str, float] = {}
    for number, logprob in top.items():
        name = lm.decode([number])
        named[f"token_id:{number}" if name in named else name] = logprob
    return named
