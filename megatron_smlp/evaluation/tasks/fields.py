"""Check the fields of the six tasks' files: a score of other values would mean nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str | None]
"""Returns a description of what is expected where a value is something else."""
SURROGATE = re.compile(r"[\ud800-\udfff]")


def text(value: Any) -> str | None:
    """Check a text: not empty, and made of whole characters. Return what is expected instead."""
    if not isinstance(value, str) or not value.strip():
        return "text that is not empty"
    return "text without half a surrogate pair" if SURROGATE.search(value) else None


def maybe_empty(value: Any) -> str | None:
    """Check a text, which may be empty."""
    return None if value == "" else text(value)


def blank(value: Any) -> str | None:
    """WinoGrande: a sentence with a place for an option."""
    return text(value) or (None if "_" in value else "a sentence with a blank, '_'")


def one_of(*allowed: int | str) -> Check:
    """One of these values; a number may be written as text."""
    texts = [str(choice) for choice in allowed]

    def check(value: Any) -> str | None:
        is_plain = isinstance(value, int | str) and not isinstance(value, bool)
        return None if is_plain and str(value) in texts else " or ".join(texts)

    return check


def options(value: Any) -> str | None:
    """HellaSwag's endings."""
    if not isinstance(value, list) or len(value) < 2:
        return "a list of two texts or more"
    return next((f"a list of two texts or more, each {p}" for v in value if (p := text(v))), None)


def passage(value: Any) -> str | None:
    """Check ReCoRD's passage: a text, and the spans of its entities, ends included."""
    match value:
        case {"text": str(body), "entities": [_, *_] as spans} if not text(body):
            if all(_is_span(span, len(body)) for span in spans):
                return None
    return (
        "an object with 'text', and 'entities' that each have 'start' and 'end' within it, one or "
        "more"
    )


def _is_span(span: Any, length: int) -> bool:
    match span:
        case {"start": start, "end": end} if type(start) is type(end) is int:
            return bool(0 <= start <= end < length)
    return False


def queries(value: Any) -> str | None:
    """Check ReCoRD's queries, each with a place for an entity and its answers."""
    if isinstance(value, list) and value and all(map(_is_query, value)):
        return None
    return (
        "a list of objects with 'query', which has @placeholder, and 'answers' that each have "
        "'text', one or more"
    )


def _is_query(query: Any) -> bool:
    match query:
        case {"query": str(asked), "answers": [_, *_] as answers} if "@placeholder" in asked:
            texts = [answer.get("text") if isinstance(answer, dict) else None for answer in answers]
            return not any(map(text, [asked, *texts]))
    return False
