"""Which tokenizer goes with an exported model, where the command line does not say it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_smlp.data.tokenizers.gpt2_folder import gpt2_folder, has_gpt2_files
from megatron_smlp.errors import UsageError


def tokenizer_folder(args: argparse.Namespace, say: Callable[[str], None]) -> str | None:
    """The run's tokenizer as a folder, if Hugging Face reads it and its files are still there.

    Args:
        args: the flags that the checkpoint recorded.
    """
    recorded = getattr(args, "tokenizer_model", None)
    is_huggingface = getattr(args, "tokenizer_type", None) == "HuggingFaceTokenizer"
    if recorded and is_huggingface and (Path(recorded) / "tokenizer_config.json").is_file():
        return str(recorded)
    reason = ""
    if has_gpt2_files(args):
        try:
            return str(gpt2_folder(args))
        except UsageError as error:
            reason = f" ({error})"
    say(f"no tokenizer is written{reason}: --tokenizer-model FOLDER adds one")
    return None
