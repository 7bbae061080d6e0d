"""Log-likelihoods of Megatron's model match the exported one's under lm-evaluation-harness."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from evaluation_helpers import LENGTH, Run, instances, loaded, scoring_cases
from lm_eval.models.huggingface import HFLM

from megatron_smlp.evaluation.harness import ScorerModel
from megatron_smlp.evaluation.huggingface_model import ExportedModel
from megatron_smlp.evaluation.megatron_scorer import MegatronScorer
from megatron_smlp.evaluation.rows import Row

SMALL = 1e-4


@pytest.fixture(scope="module")
def scorer(run: Run) -> Iterator[tuple[MegatronScorer, Any]]:
    with loaded(run.checkpoint) as (args, stages, tokenizer):
        yield MegatronScorer(stages, longest=args.seq_length, batch_size=8), tokenizer


@pytest.fixture(scope="module")
def ours(scorer: tuple[MegatronScorer, Any]) -> ScorerModel:
    return ScorerModel(*scorer)


@pytest.fixture(scope="module")
def stock(run: Run) -> HFLM:
    return HFLM(pretrained=str(run.exported), trust_remote_code=True, batch_size=4, device="cpu")


def test_scores_are_those_of_the_exported_model(ours: ScorerModel, stock: HFLM):
    """Within 1e-4 of stock lm-eval; a context that is too long is cut from the left by both."""
    pairs = scoring_cases()
    assert max(len(ours.tok_encode(context)) for context, _ in pairs) > 2 * LENGTH
    mine = ours.loglikelihood(instances(pairs))
    theirs = stock.loglikelihood(instances(pairs))
    for (score, is_greedy), (expected, greedy), pair in zip(mine, theirs, pairs, strict=True):
        assert score == pytest.approx(expected, abs=SMALL), pair
        assert is_greedy == greedy, pair
    assert len({round(score, 3) for score, _ in mine}) > 10


def test_what_the_model_would_say_is_greedy(ours: ScorerModel, run: Run):
    """As in LAMBADA: the last word is right if each of its tokens is the likeliest."""
    model = ExportedModel(run.exported, batch_size=1, device="cpu")
    context = model.tok_encode("the model mixes every token")
    said = model.model.generate(
        torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    tokens = said[0].tolist()
    other = [*tokens[:-1], (tokens[-1] + 1) % 300]
    scores = ours.scorer.score([Row(tuple(tokens), 3), Row(tuple(other), 3)])
    assert all(scores[0].greedy)
    assert scores[1].greedy == (True, True, False)


def rows() -> list[Row]:
    draw = random.Random(5)
    lengths = [2, 3, 4, 9, 9, 16, LENGTH, LENGTH + 1, 11]
    return [
        Row(tuple(draw.randrange(300) for _ in range(n)), draw.randint(1, n - 1)) for n in lengths
    ]


def test_a_score_does_not_depend_on_its_batch(scorer: tuple[MegatronScorer, Any]):
    """Bitwise in fp32 on a CPU: alone, together, in another order, with batch size 1 or 8."""
    eight, _ = scorer
    one = MegatronScorer(eight.stages, longest=LENGTH, batch_size=1)
    some = rows()
    together = eight.score(some)
    assert together == one.score(some)
    assert together == eight.score(some[::-1])[::-1]
    assert together == [eight.score([row])[0] for row in some]


def test_padded_batches_score_nearly_the_same(scorer: tuple[MegatronScorer, Any]):
    """As on GPUs: rows of many lengths in one batch, padded on the right."""
    alone, _ = scorer
    batched = MegatronScorer(alone.stages, longest=LENGTH, batch_size=1)
    batched.batch_size = 8
    for mine, theirs in zip(batched.score(rows()), alone.score(rows()), strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
