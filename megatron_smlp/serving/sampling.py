"""Run one request through `generate`, reporting tokens with log-probabilities as they come."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from megatron_smlp.generation.language_model import COLDEST, LanguageModel
from megatron_smlp.serving.requests import Asked


@dataclass(frozen=True)
class Token:
    """A token of a prompt or an answer, and its log-probability under the model."""

    id: int
    logprob: float | None
    """Log-probability; None for the first token of a prompt, which nothing predicts."""
    top: dict[int, float] | None
    """Log-probabilities of the likeliest ids at its position."""


OnToken = Callable[[int, Token], bool]
"""Called with an answer's number and its next token; returns whether the answer ends with it."""


def _tokens(ids: Sequence[int], logprobs: Tensor, count: int) -> list[Token]:
    """Return the tokens of n ids, each with `count` alternatives.

    logprobs: <fp32>[n, V] over the vocabulary at their positions.
    """
    chosen = logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0].tolist()
    values, tops = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    pairs = zip(tops.tolist(), values.tolist(), strict=True)
    likeliest = [dict(zip(*pair, strict=True)) for pair in pairs]
    return [Token(*fields) for fields in zip(ids, chosen, likeliest, strict=True)]


# Subclasses, as transformers would move its own classes in front of `_Seen`.
class _Repetition(RepetitionPenaltyLogitsProcessor): ...


class _NoPadding(SuppressTokensLogitsProcessor): ...


class _Seen(LogitsProcessor):
    """Keeps the model's own log-probabilities: before temperature, over the whole vocabulary."""

    logprobs: Tensor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logprobs = scores.float().log_softmax(dim=-1)
        return scores


class _Reporting(StoppingCriteria):
    """Reports the new token of each row, and ends the rows for which `on_token` returns True."""

    def __init__(
        self, asked: Asked, seen: _Seen, on_token: OnToken, cancelled: threading.Event
    ) -> None:
        self.asked, self.seen, self.on_token, self.cancelled = asked, seen, on_token, cancelled
        self.done = [False] * asked.n

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ids = input_ids[:, -1].tolist()
        tokens = [Token(number, None, None) for number in ids]
        if self.asked.logprobs is not None:
            tokens = _tokens(ids, self.seen.logprobs, self.asked.logprobs)
        for row, token in enumerate(tokens):
            if not self.done[row]:
                self.done[row] = self.on_token(row, token)
        return torch.tensor(self.done, device=input_ids.device) | self.cancelled.is_set()


@torch.inference_mode()
def answer(
    lm: LanguageModel,
    prompt: list[int],
    asked: Asked,
    *,
    on_token: OnToken,
    cancelled: threading.Event,
) -> None:
    """Generate the answers to a prompt in this thread, reporting every new token.

    No other thread may run this meanwhile: it seeds torch's global generator for this request.
    """
    if asked.max_tokens == 0 or cancelled.is_set():
        return
    torch.manual_seed(secrets.randbits(63) if asked.seed is None else asked.seed % 2**63)
    seen = _Seen()
    processors: list[Any] = [] if asked.logprobs is None else [seen]
    if lm.padding_ids:
        processors.append(_NoPadding(lm.padding_ids, device=lm.model.device))
    if asked.repetition_penalty != 1:
        processors.append(_Repetition(asked.repetition_penalty))
    ids = torch.tensor([prompt] * asked.n, device=lm.model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if asked.temperature >= COLDEST:
        drawn = {name: getattr(asked, name) for name in ("temperature", "top_p", "top_k")}
        sampling = {"do_sample": True, **drawn}
    lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=asked.max_tokens,
        eos_token_id=lm.ends or None,
        pad_token_id=lm.end or 0,
        suppress_tokens=[],
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([_Reporting(asked, seen, on_token, cancelled)]),
        **sampling,
    )


@torch.inference_mode()
def score(lm: LanguageModel, prompt: list[int], logprobs: int | None) -> list[Token]:
    """Return the prompt's own tokens, as `echo` requests."""
    if logprobs is None:
        return [Token(number, None, None) for number in prompt]
    ids = torch.tensor([prompt], device=lm.model.device)
    predicted = lm.model(ids).logits[0, :-1].float().log_softmax(dim=-1)
    first = Token(prompt[0], None, None)
    return [first, *_tokens(prompt[1:], predicted, logprobs)]
