"""One request at a time through `generate`: tokens with their log-probabilities, as they come."""

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

from megatron_smlp.generation.language_model import LanguageModel

COLDEST = 1e-30
"""Logits over less than this overflow; so close to 0 the likeliest token is drawn anyway."""


@dataclass(frozen=True)
class Token:
    """A token of a prompt or an answer, and what the model thought of it."""

    id: int
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: dict[int, float] | None
    """The likeliest ids in its place."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt, `n` answers."""

    prompt: list[int]
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int = 0
    """Draw from so many of the likeliest; 0: from all."""
    repetition_penalty: float = 1.0
    seed: int | None
    logprobs: int | None
    """How many of the likeliest ids to tell; None: no log-probabilities at all."""
    on_token: Callable[[int, Token], bool]
    """Called with the answer's number; whether this answer is to end here."""
    cancelled: threading.Event = field(default_factory=threading.Event)


def _tops(logprobs: Tensor, count: int) -> list[dict[int, float]]:
    """logprobs: <fp32>[n, V]."""
    if count == 0:
        return [{} for _ in range(len(logprobs))]
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [dict(zip(*pair, strict=True)) for pair in pairs]


def _tokens(ids: Sequence[int], logprobs: Tensor, count: int) -> list[Token]:
    """ids of n tokens; logprobs: <fp32>[n, V] of what could have stood in their places."""
    chosen = logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0].tolist()
    tops = _tops(logprobs, count)
    return [Token(*values) for values in zip(ids, chosen, tops, strict=True)]


class _Repetition(RepetitionPenaltyLogitsProcessor):
    """As `_NoPadding`."""


class _NoPadding(SuppressTokensLogitsProcessor):
    """A class of our own: transformers would move one of its own in front of the watcher."""


class _Watcher(LogitsProcessor, StoppingCriteria):
    """Stands in `generate` before the sampler, for the logits, and behind it, for the choice.

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
    how: dict[str, Any] = {"do_sample": False}
    if job.temperature >= COLDEST:
        how = {"do_sample": True, "temperature": job.temperature, "top_p": job.top_p}
        how["top_k"] = job.top_k
    lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job.max_tokens,
        eos_token_id=lm.end,
        pad_token_id=lm.end or 0,
        suppress_tokens=[],
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([watcher]),
        **how,
    )


@torch.inference_mode()
def score(lm: LanguageModel, prompt: list[int], logprobs: int | None) -> list[Token]:
    """The prompt's own tokens, as `echo` gives them back."""
    if logprobs is None:
        return [Token(number, None, None) for number in prompt]
    ids = torch.tensor([prompt], device=lm.model.device)
    predicted = lm.model(ids).logits[0, :-1].float().log_softmax(dim=-1)
    first = Token(prompt[0], None, None)
    return [first, *_tokens(prompt[1:], predicted, logprobs)]
