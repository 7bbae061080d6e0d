"""Continue prompts with transformers' own `generate`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_smlp.errors import UsageError
from megatron_smlp.generation.language_model import COLDEST, LanguageModel


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    text: str
    """Without the token that ended it."""
    num_tokens: int
    reached_the_end: bool
    """Whether it stopped because the model has no more positions."""


def encode_prompt(lm: LanguageModel, prompt: str, *, where: str) -> list[int]:
    """Return the ids of a prompt that can be continued.

    Args:
        where: the prompt's name in messages.

    Raises:
        UsageError: it cannot be encoded, is empty, or leaves no position to generate at.
    """
    try:
        ids = lm.encode(prompt)
    except (ValueError, TypeError) as error:  # TypeError: half of a surrogate pair
        raise UsageError(f"{where} cannot be encoded: {error}") from error
    if not prompt or not ids:
        raise UsageError(f"{where} is empty: give some text to continue")
    if len(ids) >= lm.longest:
        raise UsageError(
            f"{where} has {len(ids)} tokens; the model's limit is {lm.longest}: give "
            f"at most {lm.longest - 1}"
        )
    return ids


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `generate` that decide how tokens are chosen."""
    common = {"num_beams": options.num_beams, "num_return_sequences": options.num_samples}
    if options.temperature < COLDEST:
        return {"do_sample": False, **common}
    drawn = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    return {"do_sample": True, **drawn, **common}


def complete(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], options: argparse.Namespace
) -> Iterator[Completion]:
    """Continue prompts as one batch; sampling draws from torch's global generator.

    The longest prompt reaches position T first, and all samples stop with it.

    Args:
        prompts: token ids from `encode_prompt`, at least one each, fewer than T.
        options: those of the group `sampling` in cli.py.
    """
    padding = lm.end or 0
    rows = [torch.tensor(prompt) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids, mask = pad(rows, padding_value=padding), pad([torch.ones_like(row) for row in rows])
    room = lm.longest - ids.shape[1]
    device = lm.model.device
    with torch.inference_mode():
        output = lm.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=min(options.max_new_tokens, room),
            eos_token_id=lm.ends or None,
            pad_token_id=padding,
            suppress_tokens=lm.padding_ids or None,
            **sampling_of(options),
        )
    for row, new in enumerate(output[:, ids.shape[1] :].tolist()):
        prompt = prompts[row // options.num_samples]
        kept = list(takewhile(lambda number: number not in lm.ends, new))
        yield Completion(
            text=lm.continuation(prompt, kept),
            num_tokens=len(kept),
            reached_the_end=len(kept) == room < options.max_new_tokens,
        )
