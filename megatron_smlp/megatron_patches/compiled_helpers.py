"""Uses the index builder that Megatron's wheel carries compiled, on every device.

`initialize_megatron` calls `compile_helpers` on the first rank, which runs `make` in Megatron's
own folder. The wheel has the compiled module there, and no Makefile: `make` fails, the first rank
exits, and the others wait for it in a barrier. A source installation that has not been built yet
still compiles.
"""

from importlib.util import find_spec

from megatron.core.datasets import utils

COMPILED = "megatron.core.datasets.helpers_cpp"


def apply() -> None:
    """Replace Megatron's function where there is nothing to compile."""
    if find_spec(COMPILED) is not None:
        utils.compile_helpers = _nothing


def _nothing() -> None:
    """Compile nothing."""
