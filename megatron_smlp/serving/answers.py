"""Build the text of a growing answer up to where it ends, and write it as the API does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from megatron_smlp.generation.language_model import LanguageModel
from megatron_smlp.serving.sampling import Token

CONTEXT = 16
"""Tokens of the prompt that are decoded with an answer, for blanks and split characters."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Shown by tokenizers for bytes that are not a whole character yet."""


class Answer:
    """Tokens of one answer, as text up to the first stop text."""

    def __init__(self, lm: LanguageModel, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.lm, self.prompt, self.stops = lm, prompt[-CONTEXT:], stops
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason = "length"
        self.num_sent = 0
        self.held_back = max(map(len, stops), default=1) - 1

    def push(self, token: Token) -> bool:
        """Add a token; return whether the answer ends with it."""
        if token.id in self.lm.ends:
            self.finish_reason = "stop"
            return True
        # An unfinished character may be shown as several, one for each byte.
        before = max(0, len(self.text.rstrip(UNFINISHED)) - self.held_back - 1)
        self.ids.append(token.id)
        self.text = self.lm.continuation(self.prompt, self.ids)
        places = [place for stop in self.stops if (place := self.text.find(stop, before)) >= 0]
        if places:
            self.text, self.finish_reason = self.text[: min(places)], "stop"
        return bool(places)

    def news(self, *, ended: bool) -> str:
        """Return the text that has not been sent yet and that no later token changes."""
        safe = len(self.text)
        if not ended:
            safe = len(self.text.rstrip(UNFINISHED)) - self.held_back
        new = self.text[self.num_sent : max(safe, self.num_sent)]
        self.num_sent += len(new)
        return new


def logprobs_of(lm: LanguageModel, tokens: Sequence[Token], *, offset: int) -> dict[str, Any]:
    """Return the API's four lists, an entry per token; offsets count the tokens' own texts, from
    that of the first on.

    The end-of-document token has its entry, though the text is without it.
    """
    names = [lm.decode([token.id]) for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_named(lm, token.top) for token in tokens],
        "text_offset": list(accumulate(map(len, names), initial=offset))[:-1],
    }


def _named(lm: LanguageModel, top: dict[int, float] | None) -> dict[str, float] | None:
    """Name tokens by their texts; of two with one text, parts of a character, the second by id."""
    if top is None:
        return None
    named: dict[str, float] = {}
    for number, logprob in top.items():
        name = lm.decode([number])
        named[f"token_id:{number}" if name in named else name] = logprob
    return named
