"""The pairs equal what Megatron's own tokenizer and `IndexedDatasetBuilder` write."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import assert_same_pair, megatron_tokenizer, parse, write_with_megatron

from megatron_smlp.data.prepare.preprocessing import Summary
from megatron_smlp.data.tokenizers.factory import identity_from_arguments

Run = Callable[..., Summary]


@pytest.mark.parametrize("append_eod", [True, False])
def test_hugging_face_folder(
    run: Run,
    tmp_path: Path,
    corpus: Path,
    documents: list[str],
    hf_flags: list[str],
    append_eod: bool,
) -> None:
    flags = [*hf_flags, *(["--append-eod"] if append_eod else [])]
    run(corpus, tmp_path / "ours", *flags)
    theirs = megatron_tokenizer(hf_flags)
    rows = [[text] for text in documents]
    write_with_megatron(tmp_path / "theirs", rows, theirs, append_eod=append_eod)
    assert_same_pair(tmp_path / "ours_text_document", tmp_path / "theirs")


def test_training_arguments_give_the_identity_of_the_data_tool(hf_flags: list[str]) -> None:
    from megatron.training.arguments import _add_tokenizer_args

    theirs = _add_tokenizer_args(argparse.ArgumentParser()).parse_args(hf_flags)
    ours = parse("--input", "x", "--output-prefix", "y", *hf_flags)
    assert identity_from_arguments(theirs) == identity_from_arguments(ours)


def test_any_number_of_workers_gives_the_same_bytes(
    run: Run, tmp_path: Path, hf_flags: list[str], monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    monkeypatch.setattr("megatron_smlp.data.prepare.sources.CHUNK_BYTES", 1000)
    run(corpus, tmp_path / "one", *hf_flags, "--append-eod")
    run(corpus, tmp_path / "many", *hf_flags, "--append-eod", "--workers", 3)
    assert_same_pair(tmp_path / "one_text_document", tmp_path / "many_text_document")
