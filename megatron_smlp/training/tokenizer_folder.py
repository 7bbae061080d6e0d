"""GPT-2's two vocabulary files as a tokenizer folder, so that Megatron needs no network for them.

Megatron looks `GPT2BPETokenizer` up by the name "gpt2" on the Hugging Face hub, even where
`--vocab-file` and `--merge-file` are given. In a folder the same files are a tokenizer of its kind.
"""

from __future__ import annotations

import argparse
import atexit
import json
import shutil
import tempfile
from pathlib import Path

from megatron_smlp.errors import UsageError

CONFIG = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False} | dict.fromkeys(
    ("bos_token", "eos_token", "unk_token"), "<|endoftext|>"
)


def use_local_gpt2_files(args: argparse.Namespace) -> None:
    """Point a GPT2BPETokenizer with both files at a folder made of them, for this process's life.

    Raises:
        UsageError: one of the two files is missing.
    """
    if args.tokenizer_type != "GPT2BPETokenizer" or not (args.vocab_file and args.merge_file):
        return
    folder = Path(tempfile.mkdtemp(prefix="gpt2-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for flag, file in (("vocab", "vocab.json"), ("merge", "merges.txt")):
        source = getattr(args, f"{flag}_file")
        try:
            shutil.copy(source, folder / file)
        except OSError as error:
            raise UsageError(f"--{flag}-file {source} cannot be read: {error.strerror}.") from error
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", str(folder)
    args.vocab_file = args.merge_file = None
