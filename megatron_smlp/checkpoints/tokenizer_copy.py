"""A copy of the tokenizer in a run's folder, for a checkpoint that is read somewhere else.

Checkpoints record absolute paths. Where there is nothing any more, as on another machine, the copy
is read: `SAVE/tokenizer/`, beside the `iter_*` folders.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from megatron_smlp.durable import flush_folder, replace_folder

FOLDER = "tokenizer"
FLAGS = ("tokenizer_model", "vocab_file", "merge_file")
SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")
"""Suffixes of the files that are copied: the folder may also hold a model's weights."""


def keep_tokenizer(args: argparse.Namespace, run: Path) -> None:
    """Copy the files that the flags name into a run's folder, unless it has a copy.

    Raises:
        OSError: a file cannot be read or written.
    """
    given = (getattr(args, name, None) for name in FLAGS)
    sources = [Path(path) for path in given if path and Path(path).exists()]
    if not sources or (run / FOLDER).exists():
        return
    partial = run / f".{FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for source in sources:
        if source.is_file():
            shutil.copy(source, partial)
            continue
        (partial / source.name).mkdir()
        for path in source.iterdir():
            if path.is_file() and path.suffix in SUFFIXES:
                shutil.copy(path, partial / source.name)
    flush_folder(partial)
    replace_folder(partial, run / FOLDER)


def found_tokenizer(path: str, run: Path) -> str:
    """Return a recorded path or, if there is nothing, that of its copy in the run's folder."""
    copy = run / FOLDER / Path(path).name
    return str(copy) if copy.exists() and not Path(path).exists() else path
