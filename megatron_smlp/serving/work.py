"""Run a request in the model's thread: its prompts, one after another, into `choices`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from megatron_smlp.generation.language_model import LanguageModel
from megatron_smlp.serving.requests import Asked
from megatron_smlp.serving.sampling import Token, answer, score

Send = Callable[[dict[str, Any]], object]
CONTEXT = 16
"""Prompt tokens that are decoded with an answer, for spaces and split characters."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode the bytes of an incomplete character to."""


class Work:
    """A request that runs in the model's thread.

    Args:
        send: called with each piece of an answer as it comes; None: do not stream.
    """

    def __init__(self, lm: LanguageModel, request: Asked, send: Send | None) -> None:
        self.lm, self.request, self.send = lm, request, send
        self.cancelled = threading.Event()
        self.num_new = 0
        self.offsets: Counter[int] = Counter()
        """By answer, the total length of the tokens' texts sent so far."""

    def run(self) -> list[dict[str, Any]]:
        """Return the answers to all prompts, `n` each; to fewer if cancelled."""
        choices: list[dict[str, Any]] = []
        for number, prompt in enumerate(self.request.prompts):
            if self.cancelled.is_set():  # nobody reads the answers, nor the scores of `echo`
                break
            choices += self._answers(prompt, number)
        return choices

    def _answers(self, prompt: list[int], number: int) -> list[dict[str, Any]]:
        asked, lm = self.request, self.lm
        first = number * asked.n
        # The ids prepended to a text are not part of it.
        given = len(lm.start) if isinstance(asked.prompt[number], str) else 0
        echoed = score(lm, prompt, asked.logprobs)[given:] if asked.echo else []
        echo = lm.decode(prompt[given:]) if asked.echo else ""
        answers = [Answer(lm, prompt, asked.stop) for _ in range(asked.n)]
        tokens = [list(echoed) for _ in answers]
        if asked.echo:
            for row in range(asked.n):
                self._send(first + row, echo, echoed, None)

        def on_token(row: int, token: Token) -> bool:
            self.num_new += 1
            tokens[row].append(token)
            ended = answers[row].push(token)
            self._send(first + row, answers[row].news(ended=ended), [token], None)
            return ended

        answer(lm, prompt, asked, on_token=on_token, cancelled=self.cancelled)
        for row, done in enumerate(answers):
            self._send(first + row, done.news(ended=True), [], done.finish_reason)
        return [
            self._choice(first + row, echo + done.text, tokens[row], done.finish_reason)
            for row, done in enumerate(answers)
        ]

    def _choice(
        self, index: int, text: str, tokens: list[Token], reason: str | None, *, offset: int = 0
    ) -> dict[str, Any]:
        """Return an answer, or a piece of one, as an entry of the API's `choices`."""
        wanted = self.request.logprobs is not None
        logprobs = logprobs_of(self.lm, tokens, offset=offset) if wanted else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _send(self, index: int, text: str, tokens: list[Token], reason: str | None) -> None:
        if self.send and (text or reason or self.request.logprobs is not None):
            piece = self._choice(index, text, tokens, reason, offset=self.offsets[index])
            self.offsets[index] += sum(map(len, (piece["logprobs"] or {}).get("tokens", [])))
            self.send(piece)

    def usage(self) -> dict[str, int]:
        """Return the token counts in the API's format."""
        num_prompt = sum(map(len, self.request.prompts))
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_new,
            "total_tokens": num_prompt + self.num_new,
        }


class Answer:
    """The tokens of one answer, and their text up to the first stop text."""

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
        # An incomplete character may decode to several replacements, one per byte.
        before = max(0, len(self.text.rstrip(UNFINISHED)) - self.held_back - 1)
        self.ids.append(token.id)
        self.text = self.lm.continuation(self.prompt, self.ids)
        places = [place for stop in self.stops if (place := self.text.find(stop, before)) >= 0]
        if places:
            self.text, self.finish_reason = self.text[: min(places)], "stop"
        return bool(places)

    def news(self, *, ended: bool) -> str:
        """Return the text that has not been sent yet and that no later token can change."""
        safe = len(self.text)
        if not ended:
            safe = len(self.text.rstrip(UNFINISHED)) - self.held_back
        new = self.text[self.num_sent : max(safe, self.num_sent)]
        self.num_sent += len(new)
        return new


def logprobs_of(lm: LanguageModel, tokens: Sequence[Token], *, offset: int) -> dict[str, Any]:
    """Return the API's four lists, one entry per token; offsets count the tokens' own texts,
    starting from `offset`.

    The end-of-document token has an entry, although the text omits it.
    """
    names = [lm.decode([token.id]) for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_named(lm, token.top) for token in tokens],
        "text_offset": list(accumulate(map(len, names), initial=offset))[:-1],
    }


def _named(lm: LanguageModel, top: dict[int, float] | None) -> dict[str, float] | None:
    """Key tokens by text; if two share one, as parts of a character do, key the second by id."""
    if top is None:
        return None
    named: dict[str, float] = {}
    for number, logprob in top.items():
        name = lm.decode([number])
        named[f"token_id:{number}" if name in named else name] = logprob
    return named
