"""Which tokenizer goes with an exported model, where the command line does not say it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def tokenizer_folder(args: argparse.Namespace, say: Callable[[str], None]) -> str | None:
    """The folder that the run was trained with, if it was one of Hugging Face's and is still there.

    Args:
        args: the flags that the checkpoint recorded.
    """
    recorded = getattr(args, "tokenizer_model", None)
    is_huggingface = getattr(args, "tokenizer_type", None) == "HuggingFaceTokenizer"
    if recorded and is_huggingface and (Path(recorded) / "tokenizer_config.json").is_file():
        return str(recorded)
    say("no tokenizer is written: --tokenizer-model FOLDER adds one")
    return None
