"""Provide a tokenizer as a folder that Hugging Face can read.

Megatron looks up `GPT2BPETokenizer` by the name "gpt2" on the Hugging Face Hub, even if
`--vocab-file` and `--merge-file` are given. In a folder, the same files are a Hugging Face
tokenizer, and no network is needed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_smlp.data.tokenizers.spec import FILES, TokenizerSpec
from megatron_smlp.errors import UsageError

CONFIG = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False} | dict.fromkeys(
    ("bos_token", "eos_token", "unk_token"), "<|endoftext|>"
)


def tokenizer_in(folder: Path) -> TokenizerSpec | None:
    """Return the tokenizer in a Hugging Face model's folder; None if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return TokenizerSpec(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))


def _has_gpt2_files(args: argparse.Namespace) -> bool:
    """Return whether the flags name a tokenizer by GPT-2's two files."""
    kind = getattr(args, "tokenizer_type", None)
    return bool(kind == "GPT2BPETokenizer" and args.vocab_file and args.merge_file)


@contextlib.contextmanager
def local_gpt2_files(args: argparse.Namespace) -> Iterator[None]:
    """Point the flags of a GPT2BPETokenizer with both files at a folder made from them.

    The user's flags are restored afterwards: a checkpoint records them, and the folder disappears
    with this process.

    Raises:
        UsageError: one of the two files is missing.
    """
    if not _has_gpt2_files(args):
        yield
        return
    before = {name: getattr(args, name) for name in ("tokenizer_type", *FILES)}
    args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", str(_gpt2_folder(args))
    args.vocab_file = args.merge_file = None
    try:
        yield
    finally:
        vars(args).update(before)


def _gpt2_folder(args: argparse.Namespace) -> Path:
    """Make a folder of the files that the flags name, which exists as long as this process.

    Raises:
        UsageError: one of the two is missing.
    """
    folder = Path(tempfile.mkdtemp(prefix="gpt2-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for flag, file in (("vocab", "vocab.json"), ("merge", "merges.txt")):
        source = getattr(args, f"{flag}_file")
        try:
            shutil.copy(source, folder / file)
        except OSError as error:
            raise UsageError(f"--{flag}-file {source} cannot be read: {error.strerror}.") from error
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def recorded_tokenizer(args: argparse.Namespace, *, trusts: bool = False) -> TokenizerSpec | None:
    """Return the tokenizer that a checkpoint recorded, or None if it recorded none.

    Args:
        trusts: whether the user of the checkpoint allows the tokenizer's code to run, which the
            record cannot say.
    """
    if not getattr(args, "tokenizer_type", None):
        return None
    return dataclasses.replace(TokenizerSpec.from_arguments(args), trust_remote_code=trusts)


def tokenizer_folder(args: argparse.Namespace, say: Callable[[str], None]) -> str | None:
    """Return the run's tokenizer as a folder, if Hugging Face can read it and its files exist.

    Args:
        args: the flags that the checkpoint recorded.
    """
    recorded = getattr(args, "tokenizer_model", None)
    is_huggingface = getattr(args, "tokenizer_type", None) == "HuggingFaceTokenizer"
    if recorded and is_huggingface and (Path(recorded) / "tokenizer_config.json").is_file():
        return str(recorded)
    if _has_gpt2_files(args) and all(Path(f).is_file() for f in (args.vocab_file, args.merge_file)):
        return str(_gpt2_folder(args))
    say("no tokenizer is written: --tokenizer-model FOLDER adds one")
    return None
