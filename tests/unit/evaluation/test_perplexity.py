"""Perplexity over a whole dataset: no token is counted twice or left out."""

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from evaluation_helpers import LENGTH, TEXT, Run, beginning, loaded, preprocessed, trained
from support.conversions import run as convert
from support.in_process import pretrained
from support.launches import REPOSITORY
from tokenizers import decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_smlp import plugin_files
from megatron_smlp.conversion.convert import torch_dist_to_hf
from megatron_smlp.data.pairs.indexed import open_index
from megatron_smlp.data.tokenizers.factory import resolve_for
from megatron_smlp.data.tokenizers.spec import Tokenizer, TokenizerSpec
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation import cli, megatron_loading, perplexity
from megatron_smlp.evaluation.exported_scorer import ExportedScorer
from megatron_smlp.evaluation.megatron_loading import sequence_length
from megatron_smlp.evaluation.megatron_scorer import MegatronScorer
from megatron_smlp.evaluation.perplexity import measure, windows
from megatron_smlp.evaluation.rows import Row, RowScore


def measured(
    scorer: Any, tokenizer: Tokenizer, data: Path, *, suffix_from: int = 0, **asked: Any
) -> dict[str, Any]:
    options, _ = cli.build_parser().parse_known_args(["--data-path", str(data)])
    assert asked.keys() <= vars(options).keys()
    vars(options).update(asked)
    return measure(scorer, tokenizer, options, suffix_from=suffix_from)


def rows_of(count: int, **how: int) -> list[Row]:
    return [window.row(range(count)) for window in windows(count, longest=8, **how)]


@pytest.mark.parametrize("count", [2, 5, 8, 9, 10, 31])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_token_but_the_first_is_predicted_once(count: int, stride: int):
    cut = rows_of(count, stride=stride)
    predicted = [token for window in cut for token in window.tokens[-window.scored :]]
    assert predicted == list(range(1, count))
    assert max(len(window.tokens) for window in cut) <= 9
    contexts = [len(window.tokens) - window.scored for window in cut]
    assert contexts == [1] + [9 - stride] * (len(cut) - 1)


@pytest.mark.parametrize(("count", "stride", "limit"), [(1593, 8, 100), (40, 2, 4), (30, 1, 12)])
def test_a_few_windows_are_spread_over_the_text_and_score_alike(
    count: int, stride: int, limit: int
):
    whole = rows_of(count, stride=stride)
    some = rows_of(count, stride=stride, limit=limit)
    assert [window.scored for window in some] == [stride] * limit
    assert set(some[1:]) < set(whole)
    begins = [window.tokens[0] for window in (*some, whole[-1])]
    steps = [after - before for before, after in itertools.pairwise(begins)]
    assert max(steps) <= min(steps[:-1]) + stride
    assert rows_of(count, stride=stride, limit=len(whole)) == whole


def test_perplexity_is_that_of_the_exported_model(
    run: Run, data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(perplexity, "CHUNK", 2)  # the text has more windows
    with loaded(run.checkpoint) as (args, stages, tokenizer):
        scorer = MegatronScorer(stages, longest=args.seq_length, batch_size=8)
        asked = partial(measured, scorer, tokenizer, data)
        result = asked(suffix_from=4)
        validation = asked(split="1,1,1")
        strided = asked(stride=5)
        some = asked(limit=2, breakdown=True)
        with pytest.raises(UsageError, match="--stride 99 exceeds the model's 24 tokens"):
            asked(stride=99)
        with pytest.raises(UsageError, match="--split 100,0,0 leaves no document"):
            perplexity.validation_part(open_index(str(data)), "100,0,0")
    model = AutoModelForCausalLM.from_pretrained(run.exported, trust_remote_code=True).eval()
    again = ExportedScorer(model, longest=LENGTH, batch_size=8)
    again.batch_size = 3  # as on a GPU: the last window, which is shorter, is a batch of its own
    again_strided = measured(again, tokenizer, data, stride=5, suffix_from=4)
    assert again_strided["perplexity"] == pytest.approx(strided["perplexity"], rel=1e-5)
    tokens = torch.from_numpy(open_index(str(data)).tokens.astype("int64"))
    losses = _losses(model, tokens, LENGTH)
    behind = [loss for place, loss in enumerate(losses) if place % LENGTH >= 4]
    assert result["tokens"] == len(losses) == strided["tokens"]
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    expected = math.exp(sum(behind) / len(behind))
    assert result["suffix_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert some["tokens"] == 2 * LENGTH
    step = -(-(len(tokens) - 1) // LENGTH) // 2 * LENGTH  # the windows are spread over the text
    chosen = losses[:LENGTH] + losses[step : step + LENGTH]
    assert some["nll"] == pytest.approx(sum(chosen), rel=1e-5)
    by_position = {each["label"]: each["loss"] for each in some["breakdown"]["position"]}
    firsts = [chosen[0], chosen[LENGTH]]
    assert by_position["0"] == pytest.approx(sum(firsts) / 2, rel=1e-5)
    encoder = tokenizer.build()
    first = encoder.decode([int(tokens[0])])
    texts = [f"{TEXT} {number}" for number in range(3)]
    texts[0] = texts[0].removeprefix(first)  # nothing predicts the very first token
    num_bytes, num_words = sum(map(len, texts)), sum(len(text.split()) for text in texts)
    assert (result["bytes"], result["words"]) == (num_bytes, num_words)
    assert result["byte_perplexity"] == pytest.approx(math.exp(sum(losses) / num_bytes), rel=1e-5)
    assert result["word_perplexity"] == pytest.approx(math.exp(sum(losses) / num_words), rel=1e-5)
    middle = _losses(
        model, torch.from_numpy(open_index(str(data)).document(1).astype("int64")), LENGTH
    )
    assert validation["tokens"] == len(middle)
    assert validation["nll"] == pytest.approx(sum(middle), rel=1e-5)


class Even:
    """A scorer for which all tokens are equally likely."""

    longest = 16

    def score(self, rows: Sequence[Row], **_: Any) -> list[RowScore]:
        return [RowScore((-1.0,) * row.scored, (False,) * row.scored) for row in rows]


def tokenizer_of(folder: Path, entries: int = 300) -> Tokenizer:
    spec = TokenizerSpec(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    return resolve_for(spec, source="it", entries=entries)


def test_what_stands_before_each_text_is_no_text(tokenizer: Path, tmp_path: Path):
    """It is predicted, but counts neither as a byte nor as a word."""
    folder = beginning(tokenizer, tmp_path / "begins", 5)
    data = preprocessed(folder, tmp_path)
    result = measured(Even(), tokenizer_of(folder), data)
    texts = [f"{TEXT} {number}" for number in range(3)]
    assert result["bytes"] == sum(map(len, texts))
    assert result["words"] == sum(len(text.split()) for text in texts)


@pytest.mark.parametrize("limit", [None, 1, 5])
def test_bytes_are_those_of_what_is_predicted(tokenizer: Path, tmp_path: Path, limit: int | None):
    """Also if tokens split characters, and windows split them."""
    texts = ["Größe 日本語の文", "🙂🙃 naïve", "ещё раз " * 9, "x"]
    known = tokenizer_of(tokenizer)
    data = preprocessed(tokenizer, tmp_path, texts)
    found = measured(Even(), known, data, stride=5, limit=limit, breakdown=True)
    tokens = open_index(str(data)).tokens.tolist()
    cut = [*windows(len(tokens), longest=Even.longest, stride=5, limit=limit)]
    predicted = [token for window in cut for token in tokens[window.scored : window.end]]
    ours = known.build()
    # A byte-level tokenizer writes each byte as one character.
    entries = AutoTokenizer.from_pretrained(tokenizer).convert_ids_to_tokens(range(300))
    own = [len(entry) for entry in entries]
    expected = sum(own[token] for token in predicted if token != known.eod)
    if limit is None:
        first = len(ours.decode(tokens[:1]).encode())
        assert found["bytes"] == expected == sum(len(text.encode()) for text in texts) - first
        sizes = [len(text.encode()) - first * (text == texts[0]) for text in texts]
        by_document = found["breakdown"]["document"]
        assert [document["bytes"] for document in by_document] == sizes
        lengths = open_index(str(data)).lengths.tolist()
        assert [document["tokens"] for document in by_document] == [lengths[0] - 1, *lengths[1:]]
        for document in by_document:  # each token costs one nat
            bits = document["tokens"] / document["bytes"] / math.log(2)
            assert document["bits_per_byte"] == pytest.approx(bits)
    else:
        assert found["bytes"] == pytest.approx(expected, abs=3 * limit)
        assert "word_perplexity" not in found
    bits = len(predicted) / found["bytes"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits)
    assert found["byte_perplexity"] == pytest.approx(2**bits)


@pytest.mark.parametrize("limit", [None, 2])
def test_bytes_of_characters_outside_the_vocabulary(tmp_path: Path, limit: int | None):
    """Llama 2's tokenizer writes such a character as its bytes, and decodes none of a run of bytes
    of which one end is within a character, as at the edge of a window."""
    folder, end = tmp_path / "tokenizer", 256
    folder.mkdir()
    names = [*(f"<0x{number:02X}>" for number in range(end)), "</s>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE(vocabulary, [], unk_token="</s>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(["</s>"])
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    texts = ["a", "日本語の文" * 9, "தமிழ் " * 7]
    data = preprocessed(folder, tmp_path, texts)
    found = measured(Even(), tokenizer_of(folder, len(names)), data, limit=limit)
    tokens = open_index(str(data)).tokens.tolist()
    cut = windows(len(tokens), longest=Even.longest, stride=Even.longest, limit=limit)
    predicted = [token for window in cut for token in tokens[window.scored : window.end]]
    assert found["bytes"] == sum(token != end for token in predicted)
    if limit is None:
        assert found["bytes"] == sum(len(text.encode()) for text in texts) - 1


def test_data_of_another_vocabulary_is_read_where_that_is_allowed(
    tokenizer: Path, data: Path, tmp_path: Path
):
    folder = shutil.copytree(tokenizer, tmp_path / "other")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError, match="written with another tokenizer"):
        measured(Even(), tokenizer_of(folder), data)
    found = measured(Even(), tokenizer_of(folder), data, allow_tokenizer_mismatch=True)
    assert found["perplexity"] == pytest.approx(math.e)


def test_documents_that_were_apart_in_training_are_apart(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An end of a document predicts the first token of the next one, as in training."""
    flags = (
        f"--architecture transformer --num-attention-heads 4 --num-layers 2 --seq-length {LENGTH} "
        f"--max-position-embeddings {LENGTH} --reset-attention-mask --reset-position-ids"
    )
    apart = trained(flags, tokenizer, tmp_path)
    data = preprocessed(tokenizer, tmp_path, ["the model", "what came before", "token"])
    options, _ = cli.parse(f"--checkpoint {apart.checkpoint} --data-path {data}".split())
    with loaded(apart.checkpoint) as started:
        monkeypatch.setattr(megatron_loading, "load_model", lambda *_, **__: started)
        _, scorer, known = cli._scorer(options, [])
        found = measured(scorer, known, data)
    model = AutoModelForCausalLM.from_pretrained(apart.exported, trust_remote_code=True).eval()
    tokens = torch.from_numpy(open_index(str(data)).tokens.astype("int64"))
    assert len(tokens) <= LENGTH + 1  # one window
    ends = (tokens == known.eod).nonzero()[:, 0].tolist()
    begins = [0, *(end + 1 for end in ends[:-1])]
    documents = [tokens[begin : end + 2] for begin, end in zip(begins, ends, strict=True)]
    expected = sum(sum(_losses(model, document, LENGTH)) for document in documents)
    assert found["nll"] == pytest.approx(expected, rel=1e-5)


def _losses(model: Any, tokens: torch.Tensor, longest: int) -> list[float]:
    """Return the loss of each token of a text, window by window."""
    losses: list[float] = []
    for begin in range(0, len(tokens) - 1, longest):
        part = tokens[None, begin : begin + longest + 1]
        with torch.no_grad():
            logits = model(part[:, :-1]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none").tolist()
    return losses


TRAINED, LONGER = 8, 21
WORDS = f"""
    --architecture amlp --toeplitz --spatial-heads 2 --tiny-attention-width 8 --num-layers 2
    --seq-length {TRAINED} --max-position-embeddings {TRAINED} --lr 3e-2 --init-method-std 0.2
    --train-iters 3 --eval-iters 0 --tokenizer-type HuggingFaceTokenizer
"""


def test_perplexity_over_longer_windows(tokenizer: Path, data: Path, tmp_path: Path):
    run, exported = tmp_path / "run", tmp_path / "hf"
    with pretrained(f"{WORDS} --tokenizer-model {tokenizer} --save {run}"):
        pass
    convert(torch_dist_to_hf, run, exported, tokenizer_model=str(tokenizer), checks=False)
    with loaded(run) as (args, stages, text):
        longest = sequence_length(args, LONGER)
        scorer = MegatronScorer(stages, longest=longest, batch_size=8)
        result = measured(scorer, text, data)
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    tokens = torch.from_numpy(open_index(str(data)).tokens.astype("int64"))
    assert result["stride"] == LONGER
    assert result["nll"] == pytest.approx(sum(_losses(model, tokens, LONGER)), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"toeplitz": False},
        {"sequence_parallel": True},
        {"position_embedding_type": "learned_absolute"},
        {"architecture": "gated_conv"},
    ],
)
def test_a_length_that_a_model_cannot_take(changes: dict[str, object]):
    values = {"seq_length": 8, "toeplitz": True, "position_embedding_type": "none"}
    values |= {"tensor_model_parallel_size": 2, "sequence_parallel": False, "architecture": "gmlp"}
    plugin_files.load(str(REPOSITORY / "plugins" / "gated_conv.py"))
    with pytest.raises(UsageError, match="--seq-length 9"):
        sequence_length(argparse.Namespace(**(values | changes)), 9)
