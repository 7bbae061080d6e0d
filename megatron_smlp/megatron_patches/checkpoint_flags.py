"""Let Megatron compare a checkpoint's flags where they make the model, and where it records them.

It also wants `--make-vocab-size-divisible-by` and `--tokenizer-type` unchanged where there is a
`--vocab-file`, and reads them where a checkpoint of weights alone has none. The padding stays by
itself, and a tokenizer's vocabulary is compared with the data's.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron.training import checkpointing

FREE = frozenset({"make_vocab_size_divisible_by", "tokenizer_type"})


def apply() -> None:
    """Replace the function, once per process."""
    if not hasattr(checkpointing.check_checkpoint_args, "__wrapped__"):
        checkpointing.check_checkpoint_args = _of_the_model(checkpointing.check_checkpoint_args)


def _of_the_model(check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def wrapped(checkpoint_args: argparse.Namespace, skip_args: set[str] | None = None) -> Any:
        unknown = vars(checkpointing.get_args()).keys() - vars(checkpoint_args).keys()
        check(checkpoint_args, skip_args=FREE | unknown | (skip_args or set()))

    return wrapped
