"""Uses the index builder that Megatron's wheel carries compiled, on every device.

`initialize_megatron` calls `compile_helpers` on the first rank, which runs `make` in Megatron's
own folder. The wheel has the compiled module there, and no Makefile: `make` fails, the first rank
exits, and the others wait for it in a barrier. A source installation that has not been built yet
still compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

from megatron.core.datasets import utils

COMPILED = "megatron.core.datasets.helpers_cpp"


def apply() -> None:
    """Replace Megatron's function, once per process."""
    if not hasattr(utils.compile_helpers, "__wrapped__"):
        utils.compile_helpers = _where_missing(utils.compile_helpers)


def _where_missing(compile_helpers: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(compile_helpers)
    def wrapped() -> None:
        if find_spec(COMPILED) is None:
            compile_helpers()

    return wrapped
