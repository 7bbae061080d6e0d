"""Keep a copy of the tokenizer in a run's folder, for checkpoints that are read elsewhere.

Checkpoints record absolute paths, or names on the Hugging Face hub. For a name, or if a path is
gone, as on another machine, the copy is read: `SAVE/tokenizer/`, next to the `iter_*` folders.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from megatron_smlp.checkpoints.folders import is_same_folder
from megatron_smlp.durable import flush_folder, replace_folder

FOLDER = "tokenizer"
FLAGS = ("tokenizer_model", "vocab_file", "merge_file")
SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
"""Suffixes of the files that are copied: the folder may also hold a model's weights. A tokenizer's
own code runs if the user who reads it gives --trust-remote-code."""


def keep_tokenizer(args: argparse.Namespace, run: Path) -> None:
    """Copy the tokenizer files that the flags name into a run's folder, unless a resumed run has a
    copy."""
    given = [path for name in FLAGS if (path := getattr(args, name, None))]
    sources = {Path(path).name: source for path in given if (source := _on_this_machine(path))}
    goes_on = is_same_folder(getattr(args, "load", None), str(run))
    if not sources or (goes_on and (run / FOLDER).exists()):
        return
    partial = run / f".{FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, source in sources.items():
        if source.is_file():
            shutil.copy(source, partial / name)
            continue
        (partial / name).mkdir()
        for path in source.iterdir():
            if path.is_file() and path.suffix in SUFFIXES:
                shutil.copy(path, partial / name)
    flush_folder(partial)
    replace_folder(partial, run / FOLDER)


def _on_this_machine(path: str) -> Path | None:
    """Return the file or folder or, for a hub name, what training left in the hub's cache."""
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "tokenizer_config.json")
    except HFValidationError:  # no repository can have this name
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def found_tokenizer(path: str, run: Path) -> str:
    """Return a recorded path or, if nothing is there, that of its copy in the run's folder.

    Files were recorded by absolute paths, so a path that is not absolute is a name on the hub.
    """
    copy = run / FOLDER / Path(path).name
    is_there = Path(path).is_absolute() and Path(path).exists()
    return str(copy) if copy.exists() and not is_there else path
