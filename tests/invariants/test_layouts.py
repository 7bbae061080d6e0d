"""Every parallel layout gives the same training: losses and gradient norms of three steps, and what
the routers did in them.

All layouts of an architecture start from one checkpoint, since pipeline stages and tensor parallel
ranks draw different initial weights than one process. The gradient norm is compared too: a wrong
sum over ranks, or a message to the wrong stage, can leave the losses looking normal.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import checkpoint_tensors
from support.cover import selected, slow_unless_in
from support.language_models import strings
from support.launches import Step, launch, records, steps

NUM_STEPS = 3  # the first shows the checkpoint's weights, the others the optimizer's updates
TOLERANCE = 1e-4  # relative
# For the last gradient norm: a token between two experts switches in that step. The losses, and
# both values of the steps before, agree as everywhere.
ON_THE_EDGE = {("minhash_base", "tp2_sp"): 5e-4}

MODEL = """
    --mock-data --num-layers 4 --hidden-size 64 --ffn-hidden-size 256 --seq-length 32
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 8
    --num-workers 0 --lr 3e-3 --lr-decay-style constant --log-interval 1
    --eval-iters 1 --eval-interval 1000
"""
NUMBERS = "--tokenizer-type NullTokenizer --vocab-size 500"
EXPERTS = "--num-experts 4 --moe-token-dispatcher-type alltoall"
ATTENTION = "--architecture transformer --num-attention-heads 4"
SMLP = """
    --architecture smlp --num-dense-layers 2 --spatial-heads 2 --num-feature-experts 4
"""

MINHASH = "--architecture mixer --input-projection minhash --filter-size 64 --window 2"

ARCHITECTURES = {
    "transformer": ATTENTION,
    "transformer_switch": f"{ATTENTION} --token-router switch {EXPERTS} --moe-layer-freq 2",
    "transformer_hash": f"{ATTENTION} --token-router hash {EXPERTS}",
    "transformer_gshard": f"{ATTENTION} --token-router gshard {EXPERTS} --moe-layer-freq 2 "
    "--moe-train-capacity-factor 1 --moe-token-drop-policy position "
    "--moe-shared-expert-intermediate-size 32",
    "transformer_topk": f"{ATTENTION} --token-router topk {EXPERTS} --moe-layer-freq 2 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-shared-expert-intermediate-size 32 --group-query-attention --num-query-groups 2 "
    "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear "
    "--qk-layernorm --moe-router-num-groups 2 --moe-router-group-topk 1",
    "transformer_documents": f"{ATTENTION} --reset-attention-mask --reset-position-ids "
    "--vocab-size 40 --null-tokenizer-eod-id 7",
    "gmlp_1_head": "--architecture gmlp --spatial-heads 1",
    "gmlp_4_heads": "--architecture gmlp --spatial-heads 4",
    "transformer_mup": f"{ATTENTION} --use-mup --mup-base-hidden-size 16 --mup-base-head-dim 4",
    "amlp": "--architecture amlp --spatial-heads 2 --tiny-attention-width 16",
    "amlp_rope": "--architecture amlp --spatial-heads 2 --tiny-attention-width 16 "
    "--position-embedding-type rope",
    "smlp": f"{SMLP} --feature-router deterministic --token-router base {EXPERTS} "
    "--base-gate price --moe-shared-expert-intermediate-size 32",
    "smlp_partial": f"{SMLP} --feature-router partial --token-router base {EXPERTS}",
    "mixer": "--architecture mixer --mixer-expansion",
    "mixer_switch": f"--architecture mixer --spatial-heads 4 --toeplitz --token-router switch "
    f"{EXPERTS}",
    "minhash": MINHASH,
    "minhash_base": f"{MINHASH} --token-router base {EXPERTS}",
    "feature_moe_partial": f"{SMLP} --feature-router partial",
    "feature_moe_toeplitz": f"{SMLP} --feature-router partial --toeplitz",
}
ROUTED = {name for name, flags in ARCHITECTURES.items() if EXPERTS in flags}
PRICED = "smlp"
"""Whose BASE experts' prices are compared, too."""

TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
TWO_PROCESSES = {
    # Each tensor parallel rank must receive as many rows as the first one reads in validation.
    "tp2": f"{TP} --eval-micro-batch-size 1",
    "tp2_sp": f"{TP} --sequence-parallel",
    "pp2": PP,
    "pp2_interleaved": f"{PP} --num-layers-per-virtual-pipeline-stage 1",
    "pp2_recompute": f"{PP} --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
    "dp2": "",
    "dp2_distributed_optimizer": "--use-distributed-optimizer",
    "ep2": "--expert-model-parallel-size 2",
}
FOUR_PROCESSES = {"tp2_pp2": f"{TP} {PP}"}
ALL_LAYOUTS = {"plain": "", **TWO_PROCESSES, **FOUR_PROCESSES}
# As a Megatron-LM user without our flags writes it; Megatron requires heads and positions.
BARE_SPEC = """
    --spec megatron_smlp.architectures gmlp --num-attention-heads 1
    --position-embedding-type none --train-iters 1
"""


# For architectures that share all but one part with others, the layouts that this part could break.
FEWER = {
    "transformer_gshard": ("tp2_sp", "ep2", "dp2", "pp2_interleaved", "pp2_recompute", "tp2_pp2"),
    "transformer_topk": ("tp2_sp", "ep2", "dp2"),
    "transformer_documents": ("tp2", "tp2_sp", "pp2", "pp2_interleaved"),
    "transformer_mup": ("tp2_sp", "pp2", "dp2_distributed_optimizer"),
    "amlp_rope": ("tp2", "tp2_sp", "pp2_interleaved"),
    "smlp_partial": ("tp2_sp", "pp2", "ep2", "dp2", "tp2_pp2"),
    "feature_moe_toeplitz": ("tp2_sp", "pp2", "dp2_distributed_optimizer"),
    "mixer": ("tp2", "tp2_sp", "pp2_interleaved", "dp2_distributed_optimizer", "tp2_pp2"),
    "minhash": ("tp2", "tp2_sp", "pp2", "dp2_distributed_optimizer", "tp2_pp2"),
    "minhash_base": ("tp2_sp", "pp2_interleaved", "ep2"),
    "mixer_switch": ("tp2_sp", "pp2", "ep2", "dp2_distributed_optimizer"),
    "feature_moe_partial": ("tp2", "pp2_interleaved", "pp2_recompute", "dp2_distributed_optimizer"),
}


def _applies(layout: str, architecture: str) -> bool:
    if layout not in FEWER.get(architecture, (layout,)):
        return False
    if architecture in ROUTED:
        return layout != "tp2"  # under TP, Megatron's MoELayer is always sequence parallel
    return layout != "ep2"


def _cases(layouts: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(a, layout) for a in ARCHITECTURES for layout in layouts if _applies(layout, a)]


# Not slow: each way to split or recompute, with systems whose parts it could break.
FAST = {
    "tp2": ("amlp",),
    "tp2_sp": ("smlp",),
    "pp2": ("smlp", "transformer_documents"),
    "pp2_interleaved": ("feature_moe_partial",),
    "pp2_recompute": ("transformer_hash",),
    "dp2_distributed_optimizer": ("transformer_switch",),
    "ep2": ("smlp",),
    "tp2_pp2": ("smlp",),
}
EACH = slow_unless_in({name for names in FAST.values() for name in names}, ARCHITECTURES)


def _marked(cases: list[tuple[str, str]]) -> list[Any]:
    return slow_unless_in([(name, layout) for layout in FAST for name in FAST[layout]], cases)


class Runs:
    """The runs of this file, by architecture and layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fresh(self, architecture: str) -> str:
        """Return flags of a model and its data."""
        is_hashed = MINHASH in ARCHITECTURES[architecture]
        tokenizer = strings(self.folder / "tokenizer") if is_hashed else NUMBERS
        return f"{MODEL} {tokenizer} {ARCHITECTURES[architecture]}"

    def seed(self, architecture: str) -> str:
        """Return flags of the run that writes the checkpoint from which all others start."""
        where = f"--save {self.folder}/seeds/{architecture} --save-interval 100"
        how = f"--train-iters 1 --lr-decay-iters {NUM_STEPS} --no-save-optim --no-save-rng"
        return f"{self.fresh(architecture)} {where} {how}"

    def resumed(self, architecture: str, layout: str) -> str:
        """Return flags of a run of NUM_STEPS from that checkpoint."""
        where = f"--load {self.folder}/seeds/{architecture}"
        how = f"--train-iters {NUM_STEPS} --finetune --no-load-optim --no-load-rng"
        return f"{self.fresh(architecture)} {where} {how} {layout}"

    def plan(self, architecture: str, layout: str) -> dict[str, str]:
        """Return that run by its name; with PRICED experts, it keeps its last checkpoint."""
        name, flags = f"{architecture}/{layout}", ALL_LAYOUTS[layout]
        if architecture == PRICED:
            flags += f" --save {self.folder}/saved/{layout} --no-save-optim --save-interval 100"
        return {name: self.resumed(architecture, flags)}

    def prices(self, layout: str) -> dict[str, torch.Tensor]:
        """Return the price buffers at the end of a run with PRICED experts."""
        tensors = checkpoint_tensors(self.folder / "saved" / layout, NUM_STEPS)
        return {name: value for name, value in tensors.items() if name.endswith("router.prices")}

    def asked_for(self, request: Any, layouts: Mapping[str, str]) -> dict[str, str]:
        """Return the runs that the selected tests look at."""
        asked = selected(request, "architecture", "layout")
        cases = [case for case in _cases(layouts) if case in asked]
        return {k: v for case in cases for k, v in self.plan(*case).items()}

    def steps(self, architecture: str, layout: str) -> list[Step]:
        return steps(self.folder / architecture / layout)

    def validation_loss(self, architecture: str, layout: str) -> float:
        lines = records(self.folder / architecture / layout)
        (loss,) = [line["validation_loss"] for line in lines if "validation_loss" in line]
        return loss

    def routers(self, architecture: str, layout: str) -> list[dict[str, Any]]:
        """Return every router of every step, then of validation and test."""
        lines = records(self.folder / architecture / layout)
        names = ("routers", "validation_routers", "test_routers")
        return [router for line in lines for name in names for router in line.get(name, [])]


@pytest.fixture(scope="module")
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Make the seed checkpoints, and the runs of one process from them."""
    runs = Runs(tmp_path_factory.mktemp("layouts"))
    compared = {name for (name,) in selected(request, "architecture")}
    halved = {name for (name,) in selected(request, "in_bf16")}
    # Seeds also of those that tests without these parameters look at.
    seeded = compared | halved | {PRICED, "gmlp_1_head"}
    seeds = {f"seeds/{name}": runs.seed(name) for name in sorted(seeded)}
    plain = {k: v for name in sorted(compared) for k, v in runs.plan(name, "plain").items()}
    halves = {f"{name}/bf16": f"{runs.fresh(name)} --train-iters 1 --bf16" for name in halved}
    bare = {"bare/spec": f"{MODEL} {NUMBERS} {BARE_SPEC}"}
    launch(seeds | plain | halves | bare, processes=1, folder=runs.folder)
    return runs


@pytest.fixture(scope="module")
def two(one: Runs, request: pytest.FixtureRequest) -> Runs:
    fresh = {"start/ep2": f"{one.fresh(PRICED)} --train-iters 1 {TWO_PROCESSES['ep2']}"}
    launch(one.asked_for(request, TWO_PROCESSES) | fresh, processes=2, folder=one.folder)
    return one


@pytest.fixture(scope="module")
def four(one: Runs, request: pytest.FixtureRequest) -> Runs:
    launch(one.asked_for(request, FOUR_PROCESSES), processes=4, folder=one.folder)
    return one


def _assert_same(ours: Sequence[Step], plain: Sequence[Step], *, last: float = TOLERANCE) -> None:
    assert len(ours) == len(plain) == NUM_STEPS
    for number, (left, right) in enumerate(zip(ours, plain, strict=True), start=1):
        rel = last if number == NUM_STEPS else TOLERANCE
        assert left.loss == pytest.approx(right.loss, rel=TOLERANCE), f"loss of step {number}"
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=rel), (
            f"gradient norm of step {number}"
        )


@pytest.mark.parametrize("architecture", EACH)
def test_the_steps_move_far_more_than_the_tolerance(one: Runs, architecture: str):
    """Else all comparisons below would hold for a model that does not train."""
    pairs = list(itertools.pairwise(one.steps(architecture, "plain")))
    losses = [abs(later.loss / earlier.loss - 1) for earlier, later in pairs]
    norms = [abs(later.grad_norm / earlier.grad_norm - 1) for earlier, later in pairs]
    # Two neighbouring batches may happen to be equally hard.
    assert statistics.median(losses) > 10 * TOLERANCE
    assert statistics.median(norms) > 10 * TOLERANCE


def _assert_as_one(runs: Runs, architecture: str, layout: str) -> None:
    """Check for the same steps and validation, as many choices by the same routers, and prices."""
    last = ON_THE_EDGE.get((architecture, layout), TOLERANCE)
    _assert_same(runs.steps(architecture, layout), runs.steps(architecture, "plain"), last=last)
    assert runs.validation_loss(architecture, layout) == pytest.approx(
        runs.validation_loss(architecture, "plain"), rel=last
    )
    _assert_same_routers(runs.routers(architecture, layout), runs.routers(architecture, "plain"))
    if architecture == PRICED:
        _assert_same_prices(runs.prices(layout), runs.prices("plain"))


@pytest.mark.parametrize(("architecture", "layout"), _marked(_cases(TWO_PROCESSES)))
def test_two_processes_train_and_count_as_one(two: Runs, architecture: str, layout: str):
    _assert_as_one(two, architecture, layout)


def test_experts_on_two_ranks_start_as_in_one_process(two: Runs):
    """Each rank draws experts of its own; both must not have the first one's."""
    ((ours,), (plain,)) = two.steps("start", "ep2"), two.steps("seeds", PRICED)
    assert ours.loss == pytest.approx(plain.loss, rel=TOLERANCE)
    assert ours.grad_norm == pytest.approx(plain.grad_norm, rel=TOLERANCE)


@pytest.mark.parametrize(("architecture", "layout"), _marked(_cases(FOUR_PROCESSES)))
def test_four_processes_train_and_count_as_one(four: Runs, architecture: str, layout: str):
    _assert_as_one(four, architecture, layout)


def _assert_same_routers(ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> None:
    """Check for the same routers and as many choices; a choice on the edge may fall either way."""
    assert [(r["layer"], r["kind"], r["choices"]) for r in ours] == [
        (r["layer"], r["kind"], r["choices"]) for r in plain
    ]
    for left, right in zip(ours, plain, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"kind"}:
            is_share = "share" in name or "rate" in name
            # Two choices; shares are logged to six digits.
            allowed = {"abs": 2 / left["choices"] + 1e-6} if is_share else {"rel": 5e-3}
            assert left[name] == pytest.approx(right[name], **allowed), name


def _assert_same_prices(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    """Compare running means over the micro-batches of all data parallel ranks."""
    assert ours.keys() == plain.keys()
    assert len(plain) == 2
    for name, prices in plain.items():
        scale = prices.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(ours[name], prices, rtol=0, atol=5e-3 * scale, msg=name)


@pytest.mark.parametrize("in_bf16", slow_unless_in([PRICED], ARCHITECTURES))
def test_bf16_follows_fp32(one: Runs, in_bf16: str):
    """From the same start, the first loss differs only by rounding, but it must: it is bf16."""
    half = one.steps(in_bf16, "bf16")[0].loss
    single = one.steps("seeds", in_bf16)[0].loss
    assert half != single
    assert half == pytest.approx(single, rel=2e-3)


def test_a_bare_spec_trains_as_our_flag(one: Runs):
    """`--spec megatron_smlp.architectures gmlp` is `--architecture gmlp` with its defaults."""
    assert one.steps("bare", "spec") == one.steps("seeds", "gmlp_1_head")
