"""Requests of lm-evaluation-harness, and which of them no model can answer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_smlp.errors import UsageError

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation), and the token ids of both."""


def check_requests(requests: Sequence[Request], *, longest: int) -> None:
    """The continuation of every request must fit into the model; its context is cut to fit.

    Raises:
        UsageError: with the text, its tokens, and the model's length.
    """
    for (_, text), _, continuation in requests:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        if len(continuation) > longest:
            raise UsageError(
                f"the option {shown!r} has {len(continuation)} tokens and the model's sequences "
                f"end at {longest}: leave the example out, or evaluate a model with a longer "
                "--seq-length"
            )
        if not continuation:
            raise UsageError(
                f"the option {shown!r} has no tokens of its own: there is nothing to score"
            )
