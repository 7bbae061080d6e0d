"""model.json as words of a command line, for who starts with a checkpoint's model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_smlp.checkpoints.model_record import LAYOUT_DEPENDENT, MAY_CHANGE

# May change, but is no matter of training alone.
OF_EVALUATION = ("base_eval",)
# They follow from other flags, or from the tokenizer.
DERIVED = ("moe_router_topk", "vocab_size", "max_position_embeddings")


def model_words(parser: argparse.ArgumentParser, flags: Mapping[str, Any]) -> list[str]:
    """The flags that make the model, without what only training reads."""
    skipped = {*LAYOUT_DEPENDENT, *MAY_CHANGE, *DERIVED} - {*OF_EVALUATION}
    words: list[str] = []
    for name, value in flags.items():
        if name not in skipped and value is not None:
            actions = [action for action in parser._actions if action.dest == name]
            words += _words(actions, value)
    return words


def _words(actions: Sequence[argparse.Action], value: Any) -> Iterator[str]:
    for action in actions:
        option = action.option_strings[0]
        if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
            if action.const == value and action.default != value:
                yield option
        elif isinstance(action, argparse.BooleanOptionalAction):
            yield option if value else option.replace("--", "--no-", 1)
        elif value != action.default:
            yield f"{option}={str(value).replace(' ', '')}"
