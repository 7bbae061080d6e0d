"""Uses the compiled index builder that ships in Megatron's wheel, on every device.

`initialize_megatron` calls `compile_helpers` on the first rank, which runs `make` in Megatron's
own folder. The wheel contains the compiled module but no Makefile: `make` fails, the first rank
exits, and the others hang in a barrier. A source installation that has not been built yet still
compiles.
"""

from importlib.util import find_spec

from megatron.core.datasets import utils

COMPILED = "megatron.core.datasets.helpers_cpp"


def apply() -> None:
    """Replace Megatron's function if there is nothing to compile."""
    if find_spec(COMPILED) is not None:
        utils.compile_helpers = lambda: None
