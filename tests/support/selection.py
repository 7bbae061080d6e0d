"""Read from a mark expression of pytest's which tests it asks for."""

from typing import Any

from _pytest.mark.expression import Expression


def looks_at_gpus(expression: str) -> bool:
    """Return whether `-m EXPRESSION` asks for tests marked `gpu`, not for all but some others."""
    if not expression:
        return False
    compiled = Expression.compile(expression)

    def selects(*marks: str) -> bool:
        def has(name: str, /, **_: Any) -> bool:
            return name in marks

        return compiled.evaluate(has)

    return selects("gpu") and not selects()
