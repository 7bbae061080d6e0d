"""Run one request through `generate`, and report its tokens with log-probabilities as they come."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Token:
    """A token of a prompt or an answer, and its log-probability under the model."""

    id: int
    logprob: float | None
    """Log-probability; None for the first token of a prompt, which nothing predicts."""
    top: dict[int, float] | None
    """Log-probabilities of the likeliest ids in its place."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt, `n` answers."""

    prompt: list[int]
    max_tokens: int
    on_token: Callable[[int, Token], bool]
    """Called with the answer's number; returns whether this answer ends with the token."""
    n: int = 1
    temperature: float
    top_p: float
    top_k: int = 0
    """Number of the likeliest tokens to draw from; 0: from all."""
    repetition_penalty: float = 1.0
    seed: int | None
    logprobs: int | None = None
    """Number of the likeliest ids to report; None: no log-probabilities at all."""
    cancelled: threading.Event = field(default_factory=threading.Event)


def _tokens(ids: Sequence[int], logprobs: Tensor, count: int) -> list[Token]:
    """Return the tokens of n ids, each with `count` alternatives.

    logprobs: <fp32>[n, V] of all that could have stood in their places.
    """
    chosen = logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0].tolist()
    values, tops = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    pairs = zip(tops.tolist(), values.tolist(), strict=True)
    likeliest = [dict(zip(*pair, strict=True)) for pair in pairs]
    return [Token(*fields) for fields in zip(ids, chosen, likeliest, strict=True)]


# Classes of our own: transformers would move its own ones in front of the watcher.
class _Repetition(RepetitionPenaltyLogitsProcessor): ...


class _NoPadding(SuppressTokensLogitsProcessor): ...


class _Watcher(LogitsProcessor, StoppingCriteria):
    """A logits processor and a stopping criterion of `generate`: it sees logits and choices.

    Log-probabilities are the model's own: before the temperature, over the whole vocabulary.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.logprobs = job, torch.empty(0)
        self.done = [False] * job.n

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        if isinstance(scores, Tensor):
            if self.job.logprobs is not None:
                self.logprobs = scores.float().log_softmax(dim=-1)
            return scores
        ids = input_ids[:, -1].tolist()
        tokens = [Token(number, None, None) for number in ids]
        if self.job.logprobs is not None:
            tokens = _tokens(ids, self.logprobs, self.job.logprobs)
        for row, token in enumerate(tokens):
            if not self.done[row]:
                self.done[row] = self.job.on_token(row, token)
        ends = torch.tensor(self.done, device=input_ids.device)
        return ends | self.job.cancelled.is_set()


@torch.inference_mode()
def answer(lm: LanguageModel, job: Job) -> None:
    """Call `job.on_token` for every new token, in this thread, which no other may share.

    The random numbers are torch's global ones, seeded for this request.
    """
    if job.max_tokens == 0 or job.cancelled.is_set():
        return
    torch.manual_seed(secrets.randbits(63) if job.seed is None else job.seed % 2**63)
    watcher = _Watcher(job)
    processors: list[Any] = [watcher]
    if lm.padding_ids:
        processors.append(_NoPadding(lm.padding_ids, device=lm.model.device))
    if job.repetition_penalty != 1:
        processors.append(_Repetition(job.repetition_penalty))
    ids = torch.tensor([job.prompt] * job.n, device=lm.model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if job.temperature >= COLDEST:
        drawn = {name: getattr(job, name) for name in ("temperature", "top_p", "top_k")}
        sampling = {"do_sample": True, **drawn}
    lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job.max_tokens,
        eos_token_id=lm.ends or None,
        pad_token_id=lm.end or 0,
        suppress_tokens=[],
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([watcher]),
        **sampling,
    )


@torch.inference_mode()
def score(lm: LanguageModel, prompt: list[int], logprobs: int | None) -> list[Token]:
    """Return the prompt's own tokens, as `echo` wants them."""
    if logprobs is None:
        return [Token(number, None, None) for number in prompt]
    ids = torch.tensor([prompt], device=lm.model.device)
    predicted = lm.model(ids).logits[0, :-1].float().log_softmax(dim=-1)
    first = Token(prompt[0], None, None)
    return [first, *_tokens(prompt[1:], predicted, logprobs)]
