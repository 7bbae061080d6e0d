"""Data written with GPT-2's two files trains with the same flags, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer

from megatron_smlp.data.tokenizers import TokenizerSpec, identity_from_arguments
from megatron_smlp.errors import UsageError


@pytest.fixture
def files(tmp_path: Path) -> str:
    """vocab.json and merges.txt of a small vocabulary, as the flags that name them."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["every token mixes with what came before it"] * 9,
        vocab_size=280,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
    )
    tokenizer.save_model(str(tmp_path))
    return f"--vocab-file {tmp_path / 'vocab.json'} --merge-file {tmp_path / 'merges.txt'}"


def test_training_has_the_tokenizer_of_the_data(files: str, parse: Callable[..., Any]) -> None:
    """Same identity as the preprocessing tool computes, same ids, same end of document."""
    from megatron.training import get_tokenizer

    words = f"--architecture gmlp --tokenizer-type GPT2BPETokenizer {files}"
    args = parse(words)
    flags = dict(zip(files.split()[::2], files.split()[1::2], strict=True))
    spec = TokenizerSpec(
        tokenizer_type="GPT2BPETokenizer",
        vocab_file=flags["--vocab-file"],
        merge_file=flags["--merge-file"],
    )
    written = spec.resolve()
    assert identity_from_arguments(args) == written.identity
    text = "every token, mixes with  what came"
    assert get_tokenizer().tokenize(text) == written.build().encode_batch([text])[0].tolist()
    assert get_tokenizer().eod == written.eod


def test_missing_file_is_one_line(parse: Callable[..., Any], tmp_path: Path) -> None:
    words = "--architecture gmlp --tokenizer-type GPT2BPETokenizer --merge-file x"
    with pytest.raises(UsageError, match=r"--vocab-file .*absent.* cannot be read"):
        parse(f"{words} --vocab-file {tmp_path / 'absent.json'}")
