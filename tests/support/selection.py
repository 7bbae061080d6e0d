"""Which tests a mark expression of pytest's asks for."""

from typing import Any

from _pytest.mark.expression import Expression


def looks_at_gpus(expression: str) -> bool:
    """Whether `-m EXPRESSION` is about tests marked `gpu`, not about all but some others."""
    if not expression:
        return False
    compiled = Expression.compile(expression)

    def selects(*marks: str) -> bool:
        def has(name: str, /, **_: Any) -> bool:
            return name in marks

        return compiled.evaluate(has)

    return selects("gpu") and not selects()
