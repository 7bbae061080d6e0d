"""Log-likelihoods of whole runs, each loaded and forgotten by its own test."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from evaluation_helpers import (
    SIZES,
    TEXT,
    Run,
    beginning,
    instances,
    loaded,
    scoring_cases,
    trained,
)
from lm_eval.models.huggingface import HFLM

from megatron_smlp.data.tokenizers.model_tokenizer import start_of
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.harness import ScorerModel, run_tasks
from megatron_smlp.evaluation.megatron_model import MegatronScorer
from megatron_smlp.evaluation.selection import select_tasks
from megatron_smlp.library_logging import quiet_libraries

SMALL = 1e-4
SMLP = "--architecture smlp --num-dense-layers 1 --num-experts 4"
OTHERS = (
    "--architecture transformer --num-attention-heads 4",
    "--architecture transformer --num-attention-heads 4 --num-experts 4 --token-router switch",
    "--architecture gmlp --spatial-heads 2 --num-experts 4 --token-router hash",
    "--architecture amlp --tiny-attention-width 8",
    "--architecture transformer --num-attention-heads 4 --num-experts 4 --token-router topk "
    "--moe-router-topk 3",
    f"{SMLP} --feature-router deterministic --num-feature-experts 2 --token-router base",
)
"""Beside those of the fixture `run`."""


@pytest.mark.parametrize("flags", OTHERS)
def test_every_other_system_scores_as_its_export(
    flags: str, tokenizer: Path, tmp_path: Path
) -> None:
    run = trained(f"{SIZES} {flags}", tokenizer, tmp_path)
    pairs = scoring_cases()
    with loaded(run.checkpoint) as (args, stages, its_tokenizer):
        scorer = MegatronScorer(stages, longest=args.seq_length, batch_size=8)
        mine = ScorerModel(scorer, its_tokenizer).loglikelihood(instances(pairs))
    stock = HFLM(pretrained=str(run.exported), trust_remote_code=True, device="cpu")
    for (score, _), (expected, _) in zip(mine, stock.loglikelihood(instances(pairs)), strict=True):
        assert score == pytest.approx(expected, abs=SMALL)


def test_a_tokenizer_that_begins_texts_begins_them_for_both(
    tokenizer: Path, tmp_path: Path
) -> None:
    """As Llama's does: preprocessing puts its token there, and so does the harness."""
    folder = beginning(tokenizer, tmp_path / "begins", 0)
    run = trained(f"{SIZES} {OTHERS[0]}", folder, tmp_path)
    pairs, texts = scoring_cases(), [(TEXT,), ("a",)]
    stock = HFLM(pretrained=str(run.exported), trust_remote_code=True, device="cpu")
    with loaded(run.checkpoint) as (args, stages, its_tokenizer):
        start = start_of(its_tokenizer, args)
        scorer = MegatronScorer(stages, longest=args.seq_length, batch_size=8)
        ours = ScorerModel(scorer, its_tokenizer, start=start)
        assert start == [0]
        assert ours.tok_encode("the model") == stock.tok_encode("the model")
        assert ours.prefix_token_id == stock.prefix_token_id
        for (mine, _), (theirs, _) in zip(
            ours.loglikelihood(instances(pairs)), stock.loglikelihood(instances(pairs)), strict=True
        ):
            assert mine == pytest.approx(theirs, abs=SMALL)
        rolling = instances(texts, "loglikelihood_rolling")
        assert ours.loglikelihood_rolling(rolling) == pytest.approx(
            stock.loglikelihood_rolling(rolling), abs=SMALL
        )
    bare = Namespace(tokenizer_hf_no_include_special_tokens=True)
    assert start_of(its_tokenizer, bare) == []


def test_one_checkpoint_of_a_run_without_its_tracker(tokenizer: Path, tmp_path: Path) -> None:
    """Not random weights, which is what Megatron starts with where no tracker names any."""
    words = f"{SIZES} {OTHERS[0]} --save-interval 2"
    run = trained(words, tokenizer, tmp_path).checkpoint
    pairs = scoring_cases()[:3]

    def scores(*flags: str) -> list[float]:
        with loaded(run, *flags) as (args, stages, its_tokenizer):
            scorer = MegatronScorer(stages, longest=args.seq_length, batch_size=8)
            answers = ScorerModel(scorer, its_tokenizer).loglikelihood(instances(pairs))
            return [score for score, _ in answers]

    newest, older = scores(), scores("--ckpt-step", "2")
    assert newest != older
    (run / "latest_checkpointed_iteration.txt").unlink()
    assert scores() == newest
    assert scores("--ckpt-step", "2") == older


REAL = Path(__file__).parents[4] / "shared" / "data" / "tasks"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real task files are not here")
def test_real_files_are_scored_as_by_the_exported_model(tokenizer: Path, tmp_path: Path) -> None:
    """The first examples of each task, through the whole harness, by both models."""
    flags = f"{OTHERS[-1]} --seq-length 256 --max-position-embeddings 256"
    run = trained(flags, tokenizer, tmp_path)
    names = ["copa", "piqa", "winogrande", "hellaswag", "record"]
    with quiet_libraries():
        stock = HFLM(pretrained=str(run.exported), trust_remote_code=True, device="cpu")
        with loaded(run.checkpoint) as (args, stages, its_tokenizer):
            scorer = MegatronScorer(stages, longest=args.seq_length, batch_size=8)
            ours = ScorerModel(scorer, its_tokenizer)
            mine, theirs = (
                [*run_tasks(model, select_tasks(names, data_dir=str(REAL)), limit=2)]
                for model in (ours, stock)
            )
    assert [result.task for result in mine] == names
    for ours_of, theirs_of in zip(mine, theirs, strict=True):
        assert ours_of.as_json() == theirs_of.as_json()
        for left, right in zip(ours_of.samples, theirs_of.samples, strict=True):
            # Stock lm-eval adds up in fp32, which knows 900 nats to 6e-5.
            expected = pytest.approx(right["loglikelihoods"], rel=2e-7, abs=SMALL)
            assert left["loglikelihoods"] == expected


def test_another_vocabulary_is_refused(run: Run) -> None:
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "77")
    with (
        pytest.raises(UsageError, match=r"the tokenizer has 77 entries .* was trained with 300"),
        loaded(run.checkpoint, *flags),
    ):
        pass


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no checkpoint"), loaded(tmp_path):
        pass
