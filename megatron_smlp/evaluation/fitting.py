"""Find the examples of a task that a model cannot score, before any is scored.

An option is scored whole, after at least one token, so its tokens must fit into the model; contexts
are truncated. The requests that the harness builds for an example show what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lm_eval.models.utils import normalize_gen_kwargs

TooLong = Literal["skip", "truncate", "stop"]
MAX_NEW_TOKENS = 256
"""Limit for tasks that set no max_gen_toks; the harness's `hf` model has the same default."""


@dataclass(frozen=True)
class Misfit:
    """Why an example does not fit, in words."""

    reason: str
    can_be_cut: bool = False

    def said(self, too_long: TooLong) -> str:
        """Return what happens to the example, and why."""
        return f"{'cut' if self.is_cut(too_long) else 'left out'}: {self.reason}"

    def is_cut(self, too_long: TooLong) -> bool:
        return self.can_be_cut and too_long == "truncate"


def misfits(task: Any, model: Any, *, limit: int | None) -> dict[int, Misfit]:
    """Return the examples that do not fit, by their number in the task's data.

    Args:
        task: one of the harness.
        model: one of ours, with a `longest`; any other has no misfits.
        limit: number of examples to check, from the first; None: all.
    """
    longest = getattr(model, "longest", None)
    task.build_all_requests(limit=limit)  # those of all ranks, which must agree
    result: dict[int, Misfit] = {}
    for request in task.instances:
        check = CHECKS.get(request.request_type)
        if longest and check and (misfit := check(model, request.args, longest)):
            result.setdefault(request.doc_id, misfit)
    return result


def _option(model: Any, args: tuple[str, str], longest: int) -> Misfit | None:
    context, option = args
    count = len(option_tokens(model, context, option))
    shown = repr(option if len(option) <= 60 else f"{option[:60]}...")
    if not count:
        return Misfit(f"the option {shown} has no tokens of its own: nothing to score")
    if count > longest:
        return Misfit(
            f"the option {shown} has {count} tokens; the model's limit is {longest}",
            can_be_cut=True,
        )
    return None


def option_tokens(model: Any, context: str, option: str) -> list[int]:
    """Return the tokens of an option that the harness scores."""
    if context:
        return list(model._encode_pair(context, option)[1])
    tokens = list(model.tok_encode(option, add_special_tokens=False))
    return tokens[1:] if tokens[:1] == [model.prefix_token_id] else tokens


def _generation(model: Any, args: tuple[str, Mapping[str, Any]], longest: int) -> Misfit | None:
    given = {name: value for name, value in args[1].items() if value is not None}
    count = normalize_gen_kwargs(given, MAX_NEW_TOKENS)["max_gen_toks"]
    if 0 < count < longest:
        return None
    return Misfit(
        f"the task asks for {count} new tokens (max_gen_toks); the model's limit is {longest}"
    )


CHECKS: dict[str, Callable[[Any, Any, int], Misfit | None]] = {
    "loglikelihood": _option,
    "generate_until": _generation,
}
"""Checks by request type; whole texts are scored in windows, which always fit."""
