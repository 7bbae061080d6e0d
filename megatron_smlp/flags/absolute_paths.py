"""Files that a command line names, by their absolute paths.

A checkpoint records its flags, and is read from other folders than the one that its run was started
in: to generate, to convert, or to go on by --use-checkpoint-args.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_smlp.data.blending import SPLIT_FLAGS
from megatron_smlp.data.pairs.indexed import idx_path

FILES = ("tokenizer_model", "vocab_file", "merge_file", "hash_table", "data_args_path")
PREFIXES = ("data_path", *SPLIT_FLAGS)


def with_absolute_paths(options: Mapping[str, argparse.Action], words: Sequence[str]) -> list[str]:
    """The words of a command line; what is not there, as a name of the hub, stays as it is."""
    absolute: list[str] = []
    name = ""
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in options:
            name = options[flag].dest
            absolute.append(f"{flag}={_absolute(name, value)}" if equals else flag)
        else:
            absolute.append(_absolute(name, word))
    return absolute


def _absolute(name: str, value: str) -> str:
    path = Path(value)
    is_there = path.exists() if name in FILES else name in PREFIXES and idx_path(value).is_file()
    return str(path.absolute()) if is_there else value
