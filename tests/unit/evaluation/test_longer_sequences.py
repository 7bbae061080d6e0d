"""Perplexity over sequences that are longer than those of the training, by Toeplitz models."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from evaluation_helpers import loaded
from support.in_process import pretrained
from transformers import AutoModelForCausalLM

from megatron_smlp.conversion.convert import Options, torch_dist_to_hf
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.megatron_loading import sequence_length
from megatron_smlp.evaluation.megatron_model import MegatronScorer
from megatron_smlp.evaluation.perplexity import measure

TRAINED, LONGER = 8, 21
WORDS = f"""
    --architecture amlp --toeplitz --spatial-heads 2 --tiny-attention-width 8 --num-layers 2
    --seq-length {TRAINED} --max-position-embeddings {TRAINED} --lr 3e-2 --init-method-std 0.2
    --train-iters 3 --eval-iters 0 --tokenizer-type HuggingFaceTokenizer
"""


def test_perplexity_over_longer_windows(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    from megatron_smlp.data.pairs.indexed import open_index

    run, exported = tmp_path / "run", tmp_path / "hf"
    with pretrained(f"{WORDS} --tokenizer-model {tokenizer} --save {run}"):
        pass
    torch_dist_to_hf(Options(load=run, save=exported, tokenizer=str(tokenizer), checks=False))
    with loaded(run) as (args, stages, text):
        longest = sequence_length(args, LONGER)
        scorer = MegatronScorer(stages, longest=longest, batch_size=8)
        result = measure(scorer, text, str(data), stride=None, suffix_from=0)
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    tokens = torch.from_numpy(open_index(str(data)).tokens.astype("int64"))
    losses = []
    for begin in range(0, len(tokens) - 1, LONGER):
        part = tokens[begin : begin + LONGER + 1]
        with torch.no_grad():
            logits = model(part[None, :-1]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, part[1:], reduction="none").tolist()
    assert result["stride"] == LONGER
    assert result["tokens"] == len(losses)
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def _model(**changes: object) -> argparse.Namespace:
    values = {
        "seq_length": 8,
        "toeplitz": True,
        "position_embedding_type": "none",
        "tensor_model_parallel_size": 2,
        "sequence_parallel": False,
    }
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({}, 9), ({"toeplitz": False}, 8), ({"toeplitz": False}, 3), ({"sequence_parallel": True}, 4)],
)
def test_lengths_that_a_model_takes(changes: dict[str, object], wanted: int) -> None:
    assert sequence_length(_model(**changes), wanted) == wanted
    assert sequence_length(_model(**changes), None) == 8


@pytest.mark.parametrize(
    ("changes", "wanted", "message"),
    [
        ({"toeplitz": False}, 9, "--seq-length 9 is over the 8 tokens of the training"),
        ({"position_embedding_type": "learned_absolute"}, 9, "without learned positions"),
        ({"sequence_parallel": True}, 9, "--seq-length 9 is not a multiple of --tensor-model"),
    ],
)
def test_lengths_that_a_model_refuses(
    changes: dict[str, object], wanted: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sequence_length(_model(**changes), wanted)
