"""What the fields of the six tasks' files may hold; a score of anything else would mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str | None]
"""Says what is expected, where a value is something else."""


def text(value: Any) -> str | None:
    """Not empty, and made of whole characters."""
    if not isinstance(value, str) or not value.strip():
        return "text that is not empty"
    return None if _is_unicode(value) else "text without half a surrogate pair"


def maybe_empty(value: Any) -> str | None:
    """A text, an empty one too."""
    return None if value == "" else text(value)


def blank(value: Any) -> str | None:
    """WinoGrande: a sentence with a place for an option."""
    return text(value) or (None if "_" in value else "a sentence with a blank, '_'")


def one_of(*allowed: int | str) -> Check:
    """A number may be written as text."""
    words = [str(choice) for choice in allowed]

    def check(value: Any) -> str | None:
        is_plain = isinstance(value, int | str) and not isinstance(value, bool)
        return None if is_plain and str(value) in words else " or ".join(words)

    return check


def options(value: Any) -> str | None:
    """HellaSwag's endings."""
    if not isinstance(value, list) or len(value) < 2:
        return "a list of two texts or more"
    return next((f"a list of two texts or more, each {p}" for v in value if (p := text(v))), None)


def passage(value: Any) -> str | None:
    """ReCoRD's: a text, and the spans of its entities, their ends included."""
    expected = (
        "an object with 'text', and 'entities' that each have 'start' and 'end' within it, one or "
        "more"
    )
    if not isinstance(value, dict) or text(value.get("text")):
        return expected
    spans, length = value.get("entities"), len(value["text"])
    if not isinstance(spans, list) or not spans:
        return expected
    return None if all(_is_span(span, length) for span in spans) else expected


def _is_span(span: Any, length: int) -> bool:
    if not isinstance(span, dict):
        return False
    ends = [end for end in (span.get("start"), span.get("end")) if type(end) is int]
    return len(ends) == 2 and 0 <= ends[0] <= ends[1] < length


def queries(value: Any) -> str | None:
    """ReCoRD's: each with a place for an entity and its answers."""
    expected = (
        "a list of objects with 'query', which has @placeholder, and 'answers' that each have "
        "'text', one or more"
    )
    if not isinstance(value, list) or not value:
        return expected
    return None if all(map(_is_query, value)) else expected


def _is_query(query: Any) -> bool:
    if not isinstance(query, dict) or text(query.get("query")):
        return False
    answers = query.get("answers")
    if "@placeholder" not in query["query"] or not isinstance(answers, list) or not answers:
        return False
    return all(isinstance(answer, dict) and not text(answer.get("text")) for answer in answers)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
