"""Data written with GPT-2's two files trains with the same flags, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.conversions import run
from support.in_process import MINIMAL, pretrained
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from megatron_smlp.checkpoints.run_record import read_run_record, run_record
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert
from megatron_smlp.data.tokenizers.factory import identity_from_arguments, read_tokenizer
from megatron_smlp.data.tokenizers.spec import TokenizerSpec
from megatron_smlp.errors import UsageError

HUGGING_FACE = "--tokenizer-type HuggingFaceTokenizer"


@pytest.fixture
def files(tmp_path: Path) -> str:
    """Write vocab.json and merges.txt of a small vocabulary; return the flags that name them."""
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
    """The preprocessing tool's identity, the same ids, and the same end of document."""
    from megatron.training import get_tokenizer

    argv = f"--architecture gmlp --tokenizer-type GPT2BPETokenizer {files}"
    args = parse(argv)
    flags = dict(zip(files.split()[::2], files.split()[1::2], strict=True))
    spec = TokenizerSpec(
        tokenizer_type="GPT2BPETokenizer",
        vocab_file=flags["--vocab-file"],
        merge_file=flags["--merge-file"],
    )
    written = read_tokenizer(spec)
    assert identity_from_arguments(args) == written.identity
    text = "every token, mixes with  what came"
    assert get_tokenizer().tokenize(text) == written.build().encode_batch([text])[0].tolist()
    assert get_tokenizer().eod == written.eod


def test_a_tokenizer_without_an_end_is_refused(parse: Callable[..., Any], tmp_path: Path) -> None:
    """Megatron's dataset would fail with a TypeError."""
    ByteLevelBPETokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(UsageError, match=rf"--tokenizer-model {tmp_path} has no EOS token"):
        parse(f"--architecture gmlp {HUGGING_FACE} --tokenizer-model {tmp_path}")


def test_the_tokenizer_is_read_for_the_first_save_alone(
    files: str, parse: Callable[..., Any], tmp_path: Path
) -> None:
    """Another tokenizer type is read in a separate Python process, which may ask the hub."""
    args = parse(f"--architecture gmlp --tokenizer-type GPT2BPETokenizer {files}")
    first = run_record(args, iteration=1)["tokenizer"]["identity"]
    assert first
    (tmp_path / "vocab.json").unlink()
    assert run_record(args, iteration=2)["tokenizer"]["identity"] == first


def test_checkpoints_name_the_files_of_the_user(files: str, tmp_path: Path) -> None:
    """The folder is gone after the run: generation, evaluation and export look for the files."""
    flags = f"--architecture gmlp --tokenizer-type GPT2BPETokenizer {files}"
    base = " ".join(MINIMAL.split()).replace("--tokenizer-type NullTokenizer --vocab-size 100", "")
    with pretrained(f"{flags} --save {tmp_path / 'run'}", base=base):
        pass
    checkpoint = TorchDistCheckpoint(tmp_path / "run")
    recorded = TokenizerSpec.from_arguments(checkpoint.args)
    named = recorded.tokenizer_type, f"--vocab-file {recorded.vocab_file}", recorded.tokenizer_model
    assert named == ("GPT2BPETokenizer", files.partition(" --merge")[0], None)
    assert read_run_record(checkpoint.folder)["tokenizer"]["identity"]
    run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "every token, mixes with  what came"
    assert (
        exported.encode(text) == read_tokenizer(recorded).build().encode_batch([text])[0].tolist()
    )
