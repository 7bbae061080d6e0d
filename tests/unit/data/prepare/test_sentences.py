"""`--split-sentences`: Megatron's sentences, and a clear word where punkt's data is missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import assert_same_pair, megatron_tokenizer, write_with_megatron

from megatron_smlp.data.prepare.preprocessing import Summary
from megatron_smlp.data.prepare.sentences import SentenceSettings, Splitter, import_nltk
from megatron_smlp.errors import DataError

Run = Callable[..., Summary]
TEXTS = [
    "Mr. Smith went home. He slept.  Then he woke!\n\nWas it late? It was.",
    "One sentence only",
    "A dot.No space after it. \t Tabs follow.\nA line. (In brackets.) \u201cQuoted.\u201d End",
    "   Leading space. Trailing space.   \n",
    "...",
    "",
    "\u65e5\u672c\u8a9e\u3002 Mixed text. caf\u00e9. 3.14 is a number. e.g. this one.",
]


@pytest.fixture(scope="session")
def nltk_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """punkt_tab data of a made-up training text."""
    nltk = import_nltk()
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    trainer = PunktTrainer()
    trainer.train("Mr. Smith met Dr. Jones. Mr. Jones, e.g. him, left. They ate. " * 50)
    root = tmp_path_factory.mktemp("nltk_data")
    folder = root / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:  # NLTK writes only where it may read.
        patch.setattr(nltk.data, "path", [str(root)])
        save_punkt_params(trainer.get_params(), dir=str(folder))
    return root


@pytest.fixture
def nltk_data(nltk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(nltk_folder)])
    return nltk_folder


def _megatron_splitter(keep_newlines: bool) -> Any:
    """As Megatron's tool builds it, with the format of the data that NLTK still loads."""
    from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer, PunktTokenizer

    splitter = PunktTokenizer("english")
    if not keep_newlines:
        return splitter

    class KeepNewlines(PunktLanguageVars):
        _period_context_fmt = r"""
            \S*                          # some word material
            %(SentEndChars)s             # a potential sentence ending
            \s*                          # white space goes with the sentence
            (?=(?P<after_tok>
                %(NonWord)s              # either other punctuation
                |
                (?P<next_tok>\S+)        # or the next token
            ))"""

    return PunktSentenceTokenizer(train_text=splitter._params, lang_vars=KeepNewlines())


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_sentence_pairs_are_those_of_megatron(
    run: Run,
    tmp_path: Path,
    nltk_data: Path,
    hf_flags: list[str],
    keep_newlines: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_smlp.data.prepare.sentences.PIECE_CHARACTERS", 50)
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
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


def test_missing_data_is_said_with_the_way_to_get_it(nltk_data: Path) -> None:
    with pytest.raises(DataError, match=r"--lang klingon.*found: english.*nltk\.download"):
        Splitter(SentenceSettings("klingon"))


def test_workers_find_the_data_too(
    run: Run, tmp_path: Path, nltk_data: Path, hf_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NLTK_DATA", str(nltk_data))
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    run(source, tmp_path / "one", *hf_flags, "--split-sentences")
    run(source, tmp_path / "two", *hf_flags, "--split-sentences", "--workers", 2)
    assert_same_pair(tmp_path / "one_text_sentence", tmp_path / "two_text_sentence")
