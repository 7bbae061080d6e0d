"""Every tokenizer type has Megatron's ids, end of document and size, and one identity."""

import argparse
import base64
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from data_helpers import make_documents, megatron_tokenizer, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smlp.data.prepare import preprocess_cli, train_tokenizer_cli
from megatron_smlp.data.tokenizers.factory import read_tokenizer
from megatron_smlp.data.tokenizers.folder import recorded_tokenizer
from megatron_smlp.data.tokenizers.gigatoken_encoder import GigatokenEncoder
from megatron_smlp.data.tokenizers.huggingface import HuggingFaceTokenizer, _named_tokens
from megatron_smlp.data.tokenizers.spec import (
    FILES,
    Encoder,
    Tokenizer,
    TokenizerSpec,
    named_or_moved,
)
from megatron_smlp.errors import DataError, UsageError

DOCUMENTS = make_documents(120, seed=9)
Flags = list[object]


def resolve(flags: Sequence[object]) -> Tokenizer:
    args = parse("--input", "x", "--output-prefix", "y", *flags)
    return read_tokenizer(TokenizerSpec.from_arguments(args))


def rows(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
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
    """Write a tokenizer folder whose template puts ids around each text."""
    folder = tmp_path / "bos"
    folder.mkdir()
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.add_special_tokens(["<bos>", "<sep>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <sep>",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("<bos>", "<sep>")],
    )
    backend.save(str(folder / "tokenizer.json"))
    config = (tokenizer_folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config)
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]


@pytest.fixture
def class_flags(gpt2_files: tuple[Path, Path], tmp_path: Path) -> Flags:
    """Write a tokenizer folder that names a class, whose pipeline only `transformers` knows."""
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
):
    flags = request.getfixturevalue(kind)
    # Megatron's GPT2BPETokenizer loads "gpt2"; offline, a folder of that name provides it.
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


def test_bytes_and_numbers_are_those_of_megatron():
    from megatron.core.tokenizers.text.libraries import ByteLevelTokenizer, NullTokenizer

    theirs = ByteLevelTokenizer()
    ours = resolve(["--tokenizer-type", "ByteLevelTokenizer"])
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
    assert rows(*ours.build().encode_batch(DOCUMENTS)) == list(map(theirs.text_to_ids, DOCUMENTS))
    numbers = NullTokenizer(1000)
    ours = resolve(["--tokenizer-type", "NullTokenizer", "--vocab-size", 1000])
    assert (ours.vocab_size, ours.eod) == (numbers.vocab_size, numbers.eod)
    assert rows(*ours.build().encode_batch(["1 2", "999"])) == [[1, 2], [999]]


def test_one_vocabulary_has_one_identity_in_all_its_files(
    gpt2_flags: Flags, hf_flags: Flags, class_flags: Flags, bos_flags: Flags
):
    same = {resolve(flags).identity for flags in (gpt2_flags, hf_flags, class_flags)}
    assert len(same) == 1
    assert resolve(bos_flags).identity not in same
    assert resolve(["--tokenizer-type", "ByteLevelTokenizer"]).identity not in same
    assert resolve(["--tokenizer-type", "NullTokenizer", "--vocab-size", 9]).identity is None


def test_decoding_gives_the_text_back(gpt2_flags: Flags, hf_flags: Flags, tiktoken_flags: Flags):
    for flags in (gpt2_flags, hf_flags, tiktoken_flags, ["--tokenizer-type", "ByteLevelTokenizer"]):
        encoder = resolve(flags).build()
        for text in DOCUMENTS[:20]:
            assert encoder.decode(encoder.encode_batch([text])[0].tolist()) == text


@pytest.mark.parametrize("kind", ["hf_flags", "sentencepiece_flags"])
def test_decoding_leaves_the_vocabularys_padding_out(kind: str, request: pytest.FixtureRequest):
    tokenizer = resolve(request.getfixturevalue(kind))
    encoder = tokenizer.build()
    ids = encoder.encode_batch(["one text"])[0].tolist()
    padded = [ids[0], tokenizer.vocab_size, *ids[1:], tokenizer.vocab_size + 50]
    assert encoder.decode(padded) == encoder.decode(ids)


@pytest.fixture(scope="module")
def both_encoders(tokenizer_folder: Path) -> tuple[Encoder, Encoder]:
    """Return the fast and the slow encoder."""
    pytest.importorskip("gigatoken")
    tokenizer = HuggingFaceTokenizer((tokenizer_folder / "tokenizer.json").read_text(), 0, False)
    fast = tokenizer.build()
    assert isinstance(fast, GigatokenEncoder), fast.description
    return fast, tokenizer


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=8))
def test_the_fast_path_gives_the_ids_of_the_slow_one(
    both_encoders: tuple[Encoder, Encoder], texts: list[str]
):
    fast, slow = both_encoders
    assert rows(*fast.encode_batch(texts)) == rows(*slow.encode_batch(texts))


def test_the_fast_path_of_sentencepiece(tmp_path: Path):
    pytest.importorskip("gigatoken")
    fast = resolve(sentencepiece_model(tmp_path / "bpe", model_type="bpe"))
    encoder = fast.build()
    assert encoder.description == "gigatoken"
    texts = [*DOCUMENTS, "a <s> b</s>", "<unk>"]
    assert rows(*encoder.encode_batch(texts)) == rows(*fast.encode_batch(texts))
    slow = resolve(sentencepiece_model(tmp_path / "unigram", model_type="unigram")).build()
    assert slow.description.startswith("sentencepiece (gigatoken does not support it")


def test_without_gigatoken_or_where_it_is_wrong_the_slow_one_is_taken(
    hf_flags: Flags, monkeypatch: pytest.MonkeyPatch
):
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


def test_user_defined_pieces_that_gigatoken_gets_wrong(tmp_path: Path):
    """It treats what follows such a piece as the start of a text."""
    pytest.importorskip("gigatoken")
    pieces = {"user_defined_symbols": ["<sep>", "[X]"], "model_type": "bpe"}
    tokenizer = resolve(sentencepiece_model(tmp_path / "sp", **pieces))
    texts = ["x<sep>y", "a [X] b", "<sep>[X]"]
    encoder = tokenizer.build()
    assert rows(*encoder.encode_batch(texts)) == [
        tokenizer.processor.encode_as_ids(text) for text in texts
    ]
    assert encoder.description == "sentencepiece (gigatoken gives other ids for this tokenizer)"


def test_added_tokens_that_gigatoken_gets_wrong(tokenizer_folder: Path):
    """It matches whole words inside longer ones too; 256 plain tokens do not rule it out."""
    pytest.importorskip("gigatoken")
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.add_special_tokens([f"<|reserved_{number}|>" for number in range(256)])
    plain = HuggingFaceTokenizer(backend.to_str(), None, False).build()
    assert plain.description == "gigatoken"
    backend.add_tokens([tokenizers.AddedToken("foo", single_word=True)])
    encoder = HuggingFaceTokenizer(backend.to_str(), None, False).build()
    assert rows(*encoder.encode_batch(["food"])) == [backend.encode("food").ids]
    assert encoder.description == "tokenizers (gigatoken gives other ids for this tokenizer)"


def test_the_start_of_a_tokenizer_that_knows_no_letter():
    """Such as one of proteins or notes: what its template adds stands before the text."""
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing

    backend = tokenizers.Tokenizer(BPE({"<s>": 0, "X": 1}, []))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert HuggingFaceTokenizer(backend.to_str(), None, True).start == [0]


GENERIC = '{"tokenizer_class": "PreTrainedTokenizerFast"}'


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("tokenizer.json", "HuggingFaceTokenizer", "tokenizer.json is not readable"),
        ("sp.model", "SentencePieceTokenizer", "is not a SentencePiece model"),
        ("ranks.json", "TikTokenizer", "has no tiktoken ranks"),
        ("ranks.tiktoken", "TikTokenizer", "has no tiktoken ranks"),
    ],
)
def test_damaged_files(name: str, kind: str, message: str, tmp_path: Path):
    (tmp_path / name).write_text("nonsense")
    (tmp_path / "tokenizer_config.json").write_text(GENERIC)
    path = tmp_path if kind.startswith("Hugging") else tmp_path / name
    with pytest.raises(DataError, match=message):
        resolve(["--tokenizer-type", kind, "--tokenizer-model", path])


def test_an_end_of_document_that_is_not_there(tmp_path: Path, run: Any, corpus: Path):
    (tmp_path / "tokenizer.json").write_text(
        tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str()
    )
    (tmp_path / "tokenizer_config.json").write_text(GENERIC)
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path]
    with pytest.raises(UsageError, match="has no end-of-document token"):
        run(corpus, tmp_path / "data", *flags, "--append-eod")


def test_a_tokenizer_learns_from_so_many_bytes(tmp_path: Path):
    """The rest of the corpus changes nothing, even within the same chunk and text."""
    start = "\u00e4b \u00e4b cd cd " * 20
    learned = []
    for name, text in (("part", start), ("whole", start + "xy xy zw zw " * 900)):
        source = tmp_path / f"{name}.jsonl"
        source.write_text(json.dumps({"text": text}) + "\n")
        for limit in ("limited", "all"):
            size = len(start.encode()) if limit == "limited" else 10**9
            folder = tmp_path / f"{name}-{limit}"
            flags = f"--input {source} --output {folder} --vocab-size 260 --max-bytes {size}"
            train_tokenizer_cli.main(flags.split())
            learned.append((folder / "tokenizer.json").read_bytes())
    assert learned[0] == learned[1] == learned[2] != learned[3]


def test_lists_of_a_tokenizer_that_are_null():
    nothing = dict.fromkeys(
        ["additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"]
    )
    assert _named_tokens(nothing | {"eos_token": "end", "pad_token": None}) == ["end"]


def test_a_checkpoint_does_not_say_whom_to_trust():
    """Its tokenizer may bring code, which runs only if the user of the checkpoint allows it."""
    recorded = Namespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model="x", trust_remote_code=True
    )
    for trusts in (False, True):
        assert recorded_tokenizer(recorded, trusts=trusts).trust_remote_code is trusts


def test_every_tokenizer_flag_of_megatron_is_known():
    """Except for those that would change the ids."""
    from megatron.training.arguments import _add_tokenizer_args

    theirs = _add_tokenizer_args(argparse.ArgumentParser())._option_string_actions
    unknown = set(theirs) - set(preprocess_cli.build_parser()._option_string_actions)
    spaces = "tokenizer-sentencepiece-ignore-extra-whitespaces"
    assert unknown == {
        *("--tokenizer-hf-no-use-fast", "--tokenizer-sentencepiece-legacy"),
        *(f"--no-{spaces}", f"--disable-{spaces}"),
    }


@pytest.mark.parametrize("recorded", [None, "old"])
def test_two_files_alone_are_a_gpt2_tokenizer_or_where_the_recorded_one_is(recorded: str | None):
    def of(vocab: str, merges: str) -> TokenizerSpec:
        kind = "GPT2BPETokenizer"
        return TokenizerSpec(tokenizer_type=kind, vocab_file=vocab, merge_file=merges)

    bare = TokenizerSpec(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_hf_no_include_special_tokens=True
    )
    moved = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="x")
    assert named_or_moved(moved, bare) == replace(bare, tokenizer_model="x")
    given = Namespace(tokenizer_type=None, **dict(zip(FILES, (None, "v", "m"), strict=True)))
    assert named_or_moved(given, of(recorded, recorded) if recorded else None) == of("v", "m")
