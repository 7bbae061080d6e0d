"""Find the examples of a task that a model cannot score, before any is scored.

An option is scored as a whole behind one token or more, so its tokens have to fit into the model;
contexts are cut. What an example needs is known from its requests, which the harness makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lm_eval.models.utils import normalize_gen_kwargs

TooLong = Literal["skip", "truncate", "stop"]
LEFT_OUT, CUT = "left out: ", "cut: "
MAX_NEW_TOKENS = 256
"""Limit for tasks that set no max_gen_toks; the harness's `hf` model has the same default."""


def unfit(task: Any, model: Any, *, limit: int | None, too_long: TooLong) -> dict[int, str]:
    """Return the examples that do not fit, by their number in the task's data: what becomes of
    each, LEFT_OUT or CUT, and why.

    Args:
        task: of the harness.
        model: ours, which knows its `longest`; another one has no misfits.
        limit: examples, the first ones; None: all.
        too_long: of an option that could be cut.
    """
    longest = getattr(model, "longest", None)
    task.build_all_requests(limit=limit)  # of all ranks: they have to agree
    result: dict[int, str] = {}
    for request in task.instances:
        check = CHECKS.get(request.request_type)
        if longest and check and (why := check(model, request.args, longest, too_long)):
            result.setdefault(request.doc_id, why)
    return result


def _option(model: Any, args: tuple[str, str], longest: int, too_long: TooLong) -> str | None:
    context, option = args
    count = len(option_tokens(model, context, option))
    shown = repr(option if len(option) <= 60 else f"{option[:60]}...")
    if not count:
        return f"{LEFT_OUT}the option {shown} has no tokens of its own: there is nothing to score"
    if count > longest:
        outcome = CUT if too_long == "truncate" else LEFT_OUT
        ends = f"the model's sequences end at {longest}"
        return f"{outcome}the option {shown} has {count} tokens and {ends}"
    return None


def option_tokens(model: Any, context: str, option: str) -> list[int]:
    """Return the tokens that the harness scores of an option."""
    if context:
        return list(model._encode_pair(context, option)[1])
    tokens = list(model.tok_encode(option, add_special_tokens=False))
    return tokens[1:] if tokens[:1] == [model.prefix_token_id] else tokens


def _generation(
    model: Any, args: tuple[str, Mapping[str, Any]], longest: int, too_long: TooLong
) -> str | None:
    given = {name: value for name, value in args[1].items() if value is not None}
    count = normalize_gen_kwargs(given, MAX_NEW_TOKENS)["max_gen_toks"]
    if 0 < count < longest:
        return None
    return (
        f"{LEFT_OUT}the task asks for {count} new tokens (max_gen_toks) and the model's sequences "
        f"end at {longest}"
    )


CHECKS: dict[str, Callable[[Any, Any, int, TooLong], str | None]] = {
    "loglikelihood": _option,
    "generate_until": _generation,
}
"""By the kind of request; whole texts are scored in windows, which always fit."""
