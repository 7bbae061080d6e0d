"""Log-likelihoods of whole runs; each test loads and unloads its own."""

import shutil
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from evaluation_helpers import (
    SIZES,
    SYSTEMS,
    TEXT,
    Run,
    beginning,
    instances,
    loaded,
    scoring_cases,
    trained,
)
from lm_eval.models.huggingface import HFLM
from support.checkpoints import flip_a_bit

from megatron_smlp.checkpoints.folders import TRACKER, iteration_folder
from megatron_smlp.data.tokenizers.factory import start_of
from megatron_smlp.errors import NoGoodCheckpointError, UsageError
from megatron_smlp.evaluation.harness import ScorerModel
from megatron_smlp.evaluation.megatron_loading import _precision_flags
from megatron_smlp.evaluation.megatron_scorer import MegatronScorer
from megatron_smlp.platform import choice, cpu

SMALL = 1e-4
TRANSFORMER = "--architecture transformer --num-attention-heads 4"
OTHERS = (
    "--architecture gmlp --spatial-heads 2 --num-experts 4 --token-router hash",
    "--architecture amlp --tiny-attention-width 8 --position-embedding-type rope --rotary-base 500",
)
"""Systems in addition to those of the fixture `run`."""
of_one_system = pytest.mark.parametrize("run", ["partial"], indirect=True)


@pytest.mark.parametrize("flags", OTHERS)
def test_another_system_scores_as_its_export(flags: str, tokenizer: Path, tmp_path: Path):
    run = trained(f"{SIZES} {flags}", tokenizer, tmp_path)
    pairs = scoring_cases()
    with loaded(run.checkpoint) as (args, stages, its_tokenizer):
        scorer = MegatronScorer(stages, longest=args.seq_length, batch_size=8)
        mine = ScorerModel(scorer, its_tokenizer).loglikelihood(instances(pairs))
    stock = HFLM(pretrained=str(run.exported), trust_remote_code=True, device="cpu")
    for (score, _), (expected, _) in zip(mine, stock.loglikelihood(instances(pairs)), strict=True):
        assert score == pytest.approx(expected, abs=SMALL)


def test_a_tokenizer_that_begins_texts_begins_them_for_both(tokenizer: Path, tmp_path: Path):
    """As Llama's does: preprocessing and the harness both put its token there."""
    folder = beginning(tokenizer, tmp_path / "begins", 0)
    run = trained(f"{SIZES} {TRANSFORMER}", folder, tmp_path)
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


def test_one_checkpoint_of_a_run_without_its_tracker(tokenizer: Path, tmp_path: Path):
    """Without a tracker file, Megatron would start from random weights."""
    argv = f"{SIZES} {TRANSFORMER} --save-interval 2"
    run = trained(argv, tokenizer, tmp_path).checkpoint
    pairs = scoring_cases()[:3]

    def scores(*flags: str, folder: Path = run) -> list[float]:
        with loaded(folder, *flags) as (args, stages, its_tokenizer):
            scorer = MegatronScorer(stages, longest=args.seq_length, batch_size=8)
            answers = ScorerModel(scorer, its_tokenizer).loglikelihood(instances(pairs))
            return [score for score, _ in answers]

    newest, older = scores(), scores("--ckpt-step", "2")
    assert newest != older
    (run / TRACKER).unlink()
    assert scores() == newest
    assert scores("--ckpt-step", "2") == older
    (run / TRACKER).write_text("3")
    shutil.copytree(iteration_folder(run, 2), run / "best")
    assert scores(folder=run / "best") == older, "whatever the tracker names"
    alone = Path(shutil.copytree(run / "best", tmp_path / "elsewhere" / "best"))
    with pytest.raises(UsageError, match="needs the name iter_0000002: rename it"):
        scores(folder=alone)


@of_one_system
def test_a_tokenizer_that_has_moved(run: Run, tokenizer: Path, tmp_path: Path):
    """Only its folder is given, and every loader reads that one."""
    moved = beginning(tokenizer, tmp_path / "moved", 7)
    with loaded(run.checkpoint, "--tokenizer-model", str(moved)) as (args, _, its_tokenizer):
        assert args.tokenizer_type == "HuggingFaceTokenizer"
        assert start_of(its_tokenizer, args) == [7]


def test_weights_of_half_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    """They are loaded as fp32, unless fp16 is asked for by name."""
    given = Namespace(bf16=False, fp16=False)
    for is_cpu, dtype, expected in (
        (True, "auto", []),
        (True, "float16", ["--fp16"]),
        (False, "auto", ["--fp16"]),
    ):
        monkeypatch.setattr(cpu, "needed", lambda is_cpu=is_cpu: is_cpu)
        assert _precision_flags(given, dtype, stored=torch.float16) == expected


@of_one_system
def test_what_is_refused(run: Run, tmp_path: Path):
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "77")
    named = r"the tokenizer has 77 entries, but .* was trained with 300"
    with pytest.raises(UsageError, match=named), loaded(run.checkpoint, *flags):
        pass
    with pytest.raises(UsageError, match="holds no checkpoint"), loaded(tmp_path):
        pass
    named = "--bf16 contradicts --dtype float32"
    with pytest.raises(UsageError, match=named), loaded(run.checkpoint, "--bf16", dtype="float32"):
        pass


@pytest.mark.parametrize(("flags", "hides"), [((), []), (("--platform", "cpu"), [True])])
def test_gpus_are_hidden_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], hides: list[bool]
):
    hidden: list[bool] = []
    monkeypatch.setattr(choice, "hide_gpus", lambda: hidden.append(True))
    with pytest.raises(UsageError, match="holds no checkpoint"), loaded(tmp_path, *flags):
        pass
    assert hidden == hides


@of_one_system
def test_a_program_that_loaded_a_model_is_ended_by_sigterm(run: Run):
    """Megatron's handler only records the signal for a training loop, and there is none."""
    before = signal.getsignal(signal.SIGTERM)
    with loaded(run.checkpoint):
        assert signal.getsignal(signal.SIGTERM) == before


TOLERANCE = {"auto": 0.05, "float32": 1e-4}
"""Tolerance of a log-likelihood per token: in bf16 every sum rounds to 8 bits."""


@pytest.fixture(scope="module")
def half(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train with HASH, which routes by ids: where two of BASE's scores are nearly equal, rounding
    to 8 bits, which differs between two implementations, decides for one expert or the other."""
    folder: Path = tmp_path_factory.mktemp("bf16")
    flags = SYSTEMS["partial"].replace("--token-router base", "--token-router hash")
    return trained(f"{flags} --bf16", tokenizer, folder)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_bf16_run_is_scored_in_one_precision_by_both(half: Run, dtype: str):
    """Without --dtype in bf16, as in stock lm-eval; with float32, within 1e-4."""
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


def test_damaged_weights_are_not_scored(half: Run, tmp_path: Path):
    damaged = Path(shutil.copytree(half.checkpoint, tmp_path / "run"))
    flip_a_bit(next(damaged.glob("iter_*/__0_0.distcp")))
    with pytest.raises(NoGoodCheckpointError, match=r"__0_0\.distcp is not what"), loaded(damaged):
        pass
