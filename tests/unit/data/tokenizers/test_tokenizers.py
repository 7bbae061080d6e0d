"""Every tokenizer type gives Megatron's ids, its end of document, its size, and one identity."""

import argparse
import base64
import contextlib
import json
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import make_documents, megatron_tokenizer, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smlp.data.prepare import preprocess_cli
from megatron_smlp.data.prepare.train_tokenizer_cli import train_tokenizer
from megatron_smlp.data.tokenizers.factory import read_tokenizer
from megatron_smlp.data.tokenizers.folder import recorded_tokenizer
from megatron_smlp.data.tokenizers.gigatoken_encoder import GigatokenEncoder, gigatoken_in_place_of
from megatron_smlp.data.tokenizers.huggingface import (
    HuggingFaceEncoder,
    HuggingFaceTokenizer,
)
from megatron_smlp.data.tokenizers.spec import (
    Encoder,
    Tokenizer,
    TokenizerSpec,
)
from megatron_smlp.errors import DataError, UsageError
from megatron_smlp.program import readable_errors

DOCUMENTS = make_documents(120, seed=9)
Flags = list[object]


def resolve(flags: Sequence[object]) -> Tokenizer:
    args = parse("--input", "x", "--output-prefix", "y", *flags)
    return read_tokenizer(TokenizerSpec.from_arguments(args))


def rows(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:  # type: ignore[type-arg]
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def encode(flags: Sequence[object], texts: Sequence[str]) -> list[list[int]]:
    return rows(*resolve(flags).build().encode_batch(texts))


def sentencepiece_model(path: Path, **settings: Any) -> Flags:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(" ".join(DOCUMENTS).split("\n")),
        model_prefix=str(path),
        hard_vocab_limit=False,
        minloglevel=2,
        **({"vocab_size": 340, "byte_fallback": True} | settings),
    )
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    return [*flags, path.with_suffix(".model")]


@pytest.fixture
def sentencepiece_flags(tmp_path: Path) -> Flags:
    return sentencepiece_model(tmp_path / "sp", vocab_size=120, byte_fallback=False)


@pytest.fixture
def tiktoken_flags(tmp_path: Path) -> Flags:
    pytest.importorskip("tiktoken")
    merges = [b"th", b"the", b" t", b" the", b"wh", b"ale", b"al", b"ale "]
    tokens = dict.fromkeys([bytes([number]) for number in range(256)] + merges)
    ranks = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps(ranks))
    return [
        *("--tokenizer-type", "TikTokenizer", "--tokenizer-model", path),
        *("--tiktoken-num-special-tokens", 20, "--vocab-size", len(ranks) + 20),
        *("--tiktoken-pattern", "v2"),
    ]


@pytest.fixture
def gpt2_flags(gpt2_files: tuple[Path, Path]) -> Flags:
    vocab, merges = gpt2_files
    return ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab, "--merge-file", merges]


@pytest.fixture
def bos_flags(tokenizer_folder: Path, tmp_path: Path) -> Flags:
    """A folder whose template puts ids around each text."""
    folder = tmp_path / "bos"
    folder.mkdir()
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.add_special_tokens(["<bos>", "<sep>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <sep>",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("<bos>", "<sep>")],
    )
    backend.save(str(folder / "tokenizer.json"))
    config = (tokenizer_folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config)
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]


@pytest.fixture
def class_flags(gpt2_files: tuple[Path, Path], tmp_path: Path) -> Flags:
    """A folder that names a class, whose pipeline only `transformers` knows."""
    folder = tmp_path / "class"
    folder.mkdir()
    for path in gpt2_files:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]


@pytest.mark.parametrize(
    "kind", ["sentencepiece_flags", "tiktoken_flags", "gpt2_flags", "bos_flags", "class_flags"]
)
def test_ids_are_those_of_megatron(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    gpt2_files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = request.getfixturevalue(kind)
    # Megatron's GPT2BPETokenizer asks for "gpt2", which a folder of that name answers offline.
    working = tmp_path_factory.mktemp("working")
    (working / "gpt2").mkdir()
    (working / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    for path in gpt2_files:
        (working / "gpt2" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(working)
    theirs, ours = megatron_tokenizer(flags), resolve(flags)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.eod == theirs.eod
    assert encode(flags, DOCUMENTS) == [list(theirs.tokenize(text)) for text in DOCUMENTS]


def test_bytes_and_numbers_are_those_of_megatron() -> None:
    from megatron.core.tokenizers.text.libraries import ByteLevelTokenizer, NullTokenizer

    theirs = ByteLevelTokenizer()
    ours = resolve(["--tokenizer-type", "ByteLevelTokenizer"])
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
    assert rows(*ours.build().encode_batch(DOCUMENTS)) == list(map(theirs.text_to_ids, DOCUMENTS))
    numbers = NullTokenizer(1000)
    ours = resolve(["--tokenizer-type", "NullTokenizer", "--vocab-size", 1000])
    assert (ours.vocab_size, ours.eod) == (numbers.vocab_size, numbers.eod)
    assert rows(*ours.build().encode_batch(["1 2", "999"])) == [[1, 2], [999]]
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 9, "--null-tokenizer-eod-id", 9]
    with pytest.raises(DataError, match=r"--null-tokenizer-eod-id 9: --vocab-size 9 has ids from"):
        resolve(flags)


def test_one_vocabulary_has_one_identity_in_all_its_files(
    gpt2_flags: Flags, hf_flags: Flags, class_flags: Flags, bos_flags: Flags
) -> None:
    same = {resolve(flags).identity for flags in (gpt2_flags, hf_flags, class_flags)}
    assert len(same) == 1
    assert resolve(bos_flags).identity not in same
    assert resolve(["--tokenizer-type", "ByteLevelTokenizer"]).identity not in same
    assert resolve(["--tokenizer-type", "NullTokenizer", "--vocab-size", 9]).identity is None


def test_decoding_gives_the_text_back(
    gpt2_flags: Flags, hf_flags: Flags, tiktoken_flags: Flags
) -> None:
    for flags in (gpt2_flags, hf_flags, tiktoken_flags, ["--tokenizer-type", "ByteLevelTokenizer"]):
        encoder = resolve(flags).build()
        for text in DOCUMENTS[:20]:
            assert encoder.decode(encoder.encode_batch([text])[0].tolist()) == text


@pytest.mark.parametrize("kind", ["hf_flags", "tiktoken_flags", "sentencepiece_flags"])
def test_decoding_leaves_the_vocabularys_padding_out(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = resolve(request.getfixturevalue(kind))
    encoder = tokenizer.build()
    ids = encoder.encode_batch(["one text"])[0].tolist()
    padded = [ids[0], tokenizer.vocab_size, *ids[1:], tokenizer.vocab_size + 50]
    assert encoder.decode(padded) == encoder.decode(ids)


@pytest.fixture(scope="module")
def both_encoders(tokenizer_folder: Path) -> tuple[Encoder, Encoder]:
    return _both(HuggingFaceTokenizer((tokenizer_folder / "tokenizer.json").read_text(), 0, False))


def _both(tokenizer: HuggingFaceTokenizer) -> tuple[Encoder, Encoder]:
    """The fast and the slow encoder."""
    pytest.importorskip("gigatoken")
    fast = tokenizer.build()
    assert isinstance(fast, GigatokenEncoder), fast.description
    return fast, HuggingFaceEncoder(tokenizer.tokenizer_json, False)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=8))
def test_the_fast_path_gives_the_ids_of_the_slow_one(
    both_encoders: tuple[Encoder, Encoder], texts: list[str]
) -> None:
    fast, slow = both_encoders
    assert rows(*fast.encode_batch(texts)) == rows(*slow.encode_batch(texts))


def test_the_fast_path_of_sentencepiece(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    fast = resolve(sentencepiece_model(tmp_path / "bpe", model_type="bpe"))
    encoder = fast.build()
    assert encoder.description == "gigatoken"
    texts = [*DOCUMENTS, "a <s> b</s>", "<unk>"]
    assert rows(*encoder.encode_batch(texts)) == rows(*fast.encode_batch(texts))  # type: ignore[attr-defined]
    slow = resolve(sentencepiece_model(tmp_path / "unigram", model_type="unigram")).build()
    assert slow.description.startswith("sentencepiece (gigatoken does not support it")


def test_an_interruption_that_gigatoken_lets_go_ends_the_run(hf_flags: Flags) -> None:
    """Its native code takes what ends an import of its own for a package that is not there."""
    pytest.importorskip("gigatoken")

    class Interrupted:
        def encode_batch(self, texts: object, parallel: bool) -> list[int]:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return []

    slow = resolve(hf_flags).build()
    with pytest.raises(SystemExit) as end, readable_errors("tool"):
        gigatoken_in_place_of(slow, lambda module: Interrupted(), pieces=[])
    assert end.value.code == 130


def test_without_gigatoken_or_where_it_is_wrong_the_slow_one_is_taken(
    hf_flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken")

    def wrong(self: Any, texts: Sequence[str]) -> Any:
        return np.zeros(len(texts), np.uint32), np.ones(len(texts), np.int64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GigatokenEncoder, "encode_batch", wrong)
        encoder = resolve(hf_flags).build()
    assert encoder.description == "tokenizers (gigatoken gives other ids for this tokenizer)"
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = resolve(hf_flags).build()
    assert encoder.description == "tokenizers (pip install gigatoken is faster)"


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_user_defined_pieces_that_gigatoken_gets_wrong(tmp_path: Path, dummy_prefix: bool) -> None:
    """It takes what follows one for the start of a text, or drops the space before that."""
    pytest.importorskip("gigatoken")
    pieces = {"user_defined_symbols": ["<sep>", "[X]"], "add_dummy_prefix": dummy_prefix}
    tokenizer = resolve(sentencepiece_model(tmp_path / "sp", model_type="bpe", **pieces))
    texts = ["x<sep>y", "a [X] b", "<sep>[X]"]
    encoder = tokenizer.build()
    assert rows(*encoder.encode_batch(texts)) == [
        tokenizer.processor.encode_as_ids(text)  # type: ignore[attr-defined]
        for text in texts
    ]
    assert encoder.description == "sentencepiece (gigatoken gives other ids for this tokenizer)"


def test_added_tokens_that_gigatoken_gets_wrong(tokenizer_folder: Path) -> None:
    """It finds a whole word within longer ones too; 256 plain tokens are no reason against it."""
    pytest.importorskip("gigatoken")
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.add_special_tokens([f"<|reserved_{number}|>" for number in range(256)])
    plain = HuggingFaceTokenizer(backend.to_str(), None, False).build()
    assert plain.description == "gigatoken"
    backend.add_tokens([AddedToken("foo", single_word=True)])
    encoder = HuggingFaceTokenizer(backend.to_str(), None, False).build()
    assert rows(*encoder.encode_batch(["food"])) == [backend.encode("food").ids]
    assert encoder.description == "tokenizers (gigatoken gives other ids for this tokenizer)"


def test_a_word_level_tokenizer_that_gigatoken_does_not_know(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = HuggingFaceTokenizer(backend.to_str(), None, False).build()
    assert encoder.description.startswith("tokenizers (gigatoken")
    assert rows(*encoder.encode_batch(["a b c"])) == [[1, 2, 0]]


def _write(content: str) -> Callable[[Path], Flags]:
    def write(folder: Path) -> Flags:
        (folder / "tokenizer.json").write_text(content)
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]

    return write


def _file(name: str, kind: str) -> Callable[[Path], Flags]:
    def write(folder: Path) -> Flags:
        (folder / name).write_text("nonsense")
        return ["--tokenizer-type", kind, "--tokenizer-model", folder / name]

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_write("{}"), "tokenizer.json is not readable"),
        (_write("nonsense"), "tokenizer.json is not readable"),
        (_file("sp.model", "SentencePieceTokenizer"), "is not a SentencePiece model"),
        (_file("ranks.json", "TikTokenizer"), "holds no tiktoken ranks"),
        (_file("ranks.tiktoken", "TikTokenizer"), "holds no tiktoken ranks"),
    ],
)
def test_damaged_files(make: Callable[[Path], Flags], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        resolve(make(tmp_path))


def test_an_end_of_document_that_is_not_there(tmp_path: Path, run: Any, corpus: Path) -> None:
    from tokenizers import Tokenizer, models

    flags = _write(Tokenizer(models.BPE({"a": 0}, [])).to_str())(tmp_path)
    with pytest.raises(UsageError, match="has no end-of-document token"):
        run(corpus, tmp_path / "data", *flags, "--append-eod")


def test_a_tokenizer_learns_from_so_many_bytes(tmp_path: Path) -> None:
    """The rest of the corpus changes nothing, also where it lies in the same chunk and text."""
    start = "\u00e4b \u00e4b cd cd " * 20
    learned = []
    for name, text in (("part", start), ("whole", start + "xy xy zw zw " * 900)):
        source = tmp_path / f"{name}.jsonl"
        source.write_text(json.dumps({"text": text}) + "\n")
        for limit in ("limited", "all"):
            size = len(start.encode()) if limit == "limited" else 10**9
            folder = tmp_path / f"{name}-{limit}"
            train_tokenizer([str(source)], output=str(folder), vocab_size=260, max_bytes=size)
            learned.append((folder / "tokenizer.json").read_bytes())
    assert learned[0] == learned[1] == learned[2] != learned[3]


def test_a_checkpoint_does_not_say_whom_to_trust():
    """Its tokenizer may bring code, which runs where the user of the checkpoint lets it."""
    recorded = Namespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model="x", trust_remote_code=True
    )
    for trusts in (False, True):
        assert recorded_tokenizer(recorded, trusts=trusts).trust_remote_code is trusts


def test_every_tokenizer_flag_of_megatron_is_known() -> None:
    from megatron.training.arguments import _add_tokenizer_args

    theirs = _add_tokenizer_args(argparse.ArgumentParser())._option_string_actions
    assert set(theirs) <= set(preprocess_cli.build_parser()._option_string_actions)
