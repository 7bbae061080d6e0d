"""The pairs are the bytes that Megatron's own tokenizer and `IndexedDatasetBuilder` write."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_helpers import (
    Run,
    assert_same_pair,
    megatron_tokenizer,
    write_jsonl,
    write_with_megatron,
)

from megatron_smlp.data.prepare.sentences import SentenceSettings, Splitter
from megatron_smlp.errors import DataError

TEXTS = [
    "Mr. Smith went home. He slept.  Then he woke!\n\nWas it late? It was.",
    "One sentence only",
    "A dot.No space after it. \t Tabs follow.\nA line. (In brackets.) \u201cQuoted.\u201d End",
    "   Leading space. Trailing space.   \n",
    "...",
    "",
    "\u65e5\u672c\u8a9e\u3002 Mixed text. caf\u00e9. 3.14 is a number. e.g. this one.",
]


@pytest.mark.parametrize("append_eod", [True, False])
def test_hugging_face_folder(
    run: Run,
    tmp_path: Path,
    corpus: Path,
    documents: list[str],
    hf_flags: list[str],
    append_eod: bool,
):
    flags = [*hf_flags, *(["--append-eod"] if append_eod else [])]
    run(corpus, tmp_path / "ours", *flags)
    theirs = megatron_tokenizer(hf_flags)
    rows = [[text] for text in documents]
    write_with_megatron(tmp_path / "theirs", rows, theirs, append_eod=append_eod)
    assert_same_pair(tmp_path / "ours_text_document", tmp_path / "theirs")


def test_any_number_of_workers_gives_the_same_bytes(
    run: Run, tmp_path: Path, hf_flags: list[str], monkeypatch: pytest.MonkeyPatch, corpus: Path
):
    monkeypatch.setattr("megatron_smlp.data.prepare.sources.CHUNK_BYTES", 1000)
    run(corpus, tmp_path / "one", *hf_flags, "--append-eod")
    run(corpus, tmp_path / "many", *hf_flags, "--append-eod", "--workers", 3)
    assert_same_pair(tmp_path / "one_text_document", tmp_path / "many_text_document")


@pytest.fixture(scope="module")
def nltk_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Write punkt_tab data trained on a made-up text."""
    import nltk
    from nltk.tokenize import punkt

    trainer = punkt.PunktTrainer()
    trainer.train("Mr. Smith met Dr. Jones. Mr. Jones, e.g. him, left. They ate. " * 50)
    root = tmp_path_factory.mktemp("nltk_data")
    folder = root / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:  # NLTK writes only to folders that it may read.
        patch.setattr(nltk.data, "path", [str(root)])
        punkt.save_punkt_params(trainer.get_params(), dir=str(folder))
        yield


def _megatron_splitter(keep_newlines: bool) -> Any:
    """Build Megatron's splitter, from the data format that NLTK still loads."""
    from nltk.tokenize import punkt

    splitter = punkt.PunktTokenizer("english")
    if not keep_newlines:
        return splitter

    class KeepNewlines(punkt.PunktLanguageVars):
        _period_context_fmt = r"""
            \S*                          # some word material
            %(SentEndChars)s             # a potential sentence ending
            \s*                          # white space goes with the sentence
            (?=(?P<after_tok>
                %(NonWord)s              # either other punctuation
                |
                (?P<next_tok>\S+)        # or the next token
            ))"""

    return punkt.PunktSentenceTokenizer(train_text=splitter._params, lang_vars=KeepNewlines())


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_sentence_pairs_are_those_of_megatron(
    run: Run,
    tmp_path: Path,
    nltk_data: None,
    hf_flags: list[str],
    keep_newlines: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("megatron_smlp.data.prepare.sentences.PIECE_CHARACTERS", 50)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    flags = ["--split-sentences", "--append-eod", *(["--keep-newlines"] if keep_newlines else [])]
    run(source, tmp_path / "ours", *hf_flags, *flags)
    splitter = _megatron_splitter(keep_newlines)
    sentences = [
        [part for at in range(0, len(text), 50) for part in splitter.tokenize(text[at : at + 50])]
        for text in TEXTS
        if text
    ]
    assert sum(map(len, sentences)) > 15
    theirs = megatron_tokenizer(hf_flags)
    write_with_megatron(tmp_path / "theirs", sentences, theirs, append_eod=True)
    assert_same_pair(tmp_path / "ours_text_sentence", tmp_path / "theirs")


def test_missing_data_is_said_with_the_way_to_get_it(nltk_data: None):
    with pytest.raises(DataError, match=r"--lang klingon.*nltk\.download"):
        Splitter(SentenceSettings("klingon"))
