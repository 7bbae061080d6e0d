"""`generate_until` of lm-evaluation-harness: text up to one of some stop texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_smlp.errors import UsageError
from megatron_smlp.generation.language_model import LanguageModel
from megatron_smlp.serving.answers import Answer
from megatron_smlp.serving.engine import Job, Token, answer

MAX_NEW_TOKENS = 256
"""Where a task does not say, as the harness's `hf` model."""


def generate_until(lm: LanguageModel, context: str, how: Mapping[str, Any]) -> str:
    """What follows a context, which loses its beginning where it leaves too little room.

    Args:
        how: the task's `generation_kwargs`: until, max_gen_toks, do_sample, temperature, top_p.

    Raises:
        UsageError: more new tokens than the model has positions.
    """
    count = int(how.get("max_gen_toks", MAX_NEW_TOKENS))
    if not 0 < count < lm.longest:
        raise UsageError(
            f"the task asks for {count} new tokens (max_gen_toks) and the model's sequences end at "
            f"{lm.longest}: evaluate a model with a longer --seq-length"
        )
    prompt = lm.encode(context) or [lm.end or 0]
    prompt = prompt[-(lm.longest - count) :]
    until = how.get("until") or []
    said = Answer(lm, prompt, [until] if isinstance(until, str) else list(until))

    def on_token(_: int, token: Token) -> bool:
        return said.push(token)

    samples = bool(how.get("do_sample", False))
    answer(
        lm,
        Job(
            prompt=prompt,
            n=1,
            max_tokens=count,
            temperature=float(how.get("temperature", 1.0)) if samples else 0.0,
            top_p=float(how.get("top_p", 1.0)),
            seed=0,
            logprobs=None,
            on_token=on_token,
        ),
    )
    return said.text
