"""Precision of scores: a bf16 run, its adapter, and its export under stock lm-eval."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from evaluation_helpers import SYSTEMS, Run, instances, loaded, scoring_cases, trained
from lm_eval.models.huggingface import HFLM
from support.checkpoints import flip_a_bit

from megatron_smlp.errors import NoGoodCheckpointError, UsageError
from megatron_smlp.evaluation.harness import ScorerModel
from megatron_smlp.evaluation.megatron_model import MegatronScorer

TOLERANCE = {"auto": 0.05, "float32": 1e-4}
"""Of a log-likelihood per token: in bf16 every sum rounds to 8 bits."""


@pytest.fixture(scope="module")
def half(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """HASH, whose choice is of the ids: where two scores of BASE are nearly the same, rounding to 8
    bits, which differs between two implementations, decides for one expert or the other."""
    folder: Path = tmp_path_factory.mktemp("bf16")
    flags = SYSTEMS["partial"].replace("--token-router base", "--token-router hash")
    return trained(f"{flags} --bf16", tokenizer, folder)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_bf16_run_is_scored_in_one_precision_by_both(half: Run, dtype: str) -> None:
    """Without a word in bf16, as stock lm-eval without one; asked for float32, within 1e-4."""
    pairs = scoring_cases()
    with loaded(half.checkpoint, dtype=dtype) as (args, stages, tokenizer):
        wanted = torch.bfloat16 if dtype == "auto" else torch.float32
        assert {parameter.dtype for parameter in stages[0].parameters()} == {wanted}
        scorer = MegatronScorer(stages, longest=args.seq_length, batch_size=8)
        ours = ScorerModel(scorer, tokenizer)
        mine = ours.loglikelihood(instances(pairs))
        lengths = [len(ours.tok_encode(option)) for _, option in pairs]
    asked = {} if dtype == "auto" else {"dtype": dtype}
    stock = HFLM(pretrained=str(half.exported), trust_remote_code=True, device="cpu", **asked)
    theirs = stock.loglikelihood(instances(pairs))
    for (score, _), (expected, _), count in zip(mine, theirs, lengths, strict=True):
        assert score == pytest.approx(expected, abs=count * TOLERANCE[dtype])


def test_flags_that_contradict_are_refused(half: Run) -> None:
    with (
        pytest.raises(UsageError, match="--bf16 contradicts --dtype float32"),
        loaded(half.checkpoint, "--bf16", dtype="float32"),
    ):
        pass


def test_damaged_weights_are_not_scored(half: Run, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(half.checkpoint, tmp_path / "run"))
    flip_a_bit(next(damaged.glob("iter_*/__0_0.distcp")))
    with (
        pytest.raises(NoGoodCheckpointError, match=r"__0_0\.distcp is not what was written"),
        loaded(damaged),
    ):
        pass
