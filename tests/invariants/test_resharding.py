"""A run resumes under any other layout, with its optimizer state: the next steps are the same.

One run of four steps saves after the second. Another layout loads that save and makes the last two
steps, whose losses and gradient norms must equal the first run's. The third gradient norm checks
the weights, the fourth whether the update used the right moments and step count.

The vocabulary of 300, or of 257 where tokens need strings, is padded to 384 for one tensor parallel
rank and to 512 for two.
"""

import itertools
from pathlib import Path

import pytest
from support.conversions import run
from support.cover import selected, slow_unless_in
from support.language_models import strings
from support.launches import launch, records, steps

from megatron_smlp.conversion import convert

SAVED, LAST = 2, 4
TOLERANCE = 1e-4  # relative
# Layouts sum the gradient norm, by which gradients are clipped, in different orders: 1e-7 of it.
# From the second step on, some bf16 weights round differently, and a token whose two best experts
# are that close may switch between them.
ROUNDED_TOLERANCE = 1e-3
CHANGED_SHARE = 0.01  # of the choices of a router

MODEL = f"""
    --mock-data
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 256 --seq-length 32
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 8
    --num-workers 0 --lr 3e-3 --lr-decay-style constant --log-interval 1
    --eval-iters 0 --train-iters {LAST}
"""
NUMBERS = "--tokenizer-type NullTokenizer --vocab-size 300"
EXPERTS = "--num-experts 4 --moe-token-dispatcher-type alltoall"
ATTENTION = "--architecture transformer --num-attention-heads 4"
SMLP = f"""
    --architecture smlp --num-dense-layers 2 --spatial-heads 2 --num-feature-experts 4
    --token-router base {EXPERTS}
"""
MINHASH = "--architecture mixer --input-projection minhash --filter-size 64 --window 2"
SYSTEMS = {
    "transformer": ATTENTION,
    "transformer_bf16": f"{ATTENTION} --bf16",
    "transformer_mup": f"{ATTENTION} --use-mup --mup-base-hidden-size 16 --mup-base-head-dim 4",
    "gshard": f"{ATTENTION} --token-router gshard {EXPERTS} --moe-layer-freq 2",
    "switch": f"{ATTENTION} --token-router switch {EXPERTS} --moe-layer-freq 2",
    "base": f"{ATTENTION} --token-router base {EXPERTS} --moe-layer-freq 2",
    "hash": f"{ATTENTION} --token-router hash {EXPERTS} --moe-layer-freq 2",
    "gmlp": "--architecture gmlp",
    "amlp": "--architecture amlp --spatial-heads 2 --tiny-attention-width 16",
    "mixer": "--architecture mixer --spatial-heads 2 --mixer-expansion",
    "minhash": MINHASH,
    "minhash_base": f"{MINHASH} --token-router base {EXPERTS}",
    "smlp": f"{SMLP} --feature-router deterministic",
    "smlp_partial": f"{SMLP} --feature-router partial",
}
ROUTED = {name for name, flags in SYSTEMS.items() if EXPERTS in flags}

TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
EP = "--expert-model-parallel-size 2"
INTERLEAVED = f"{PP} --num-layers-per-virtual-pipeline-stage 1"
DISTRIBUTED = "--use-distributed-optimizer"
LAYOUTS = {
    "one": (1, ""),
    "one_distributed": (1, DISTRIBUTED),
    "tp": (2, TP),
    "tp_distributed": (2, f"{TP} {DISTRIBUTED}"),
    "pp": (2, PP),
    "pp_distributed": (2, f"{PP} {DISTRIBUTED}"),
    "interleaved": (2, INTERLEAVED),
    "interleaved_distributed": (2, f"{INTERLEAVED} {DISTRIBUTED}"),
    "dp": (2, ""),
    "dp_distributed": (2, DISTRIBUTED),
    "dp_parallel_load": (2, f"{DISTRIBUTED} --ckpt-fully-parallel-load"),
    "ep": (2, EP),
    "ep_distributed": (2, f"{EP} {DISTRIBUTED}"),
    "tp_pp_distributed": (4, f"{TP} {PP} {DISTRIBUTED}"),
    "interleaved_dp_distributed": (4, f"{INTERLEAVED} {DISTRIBUTED}"),
    "tp_dp": (4, TP),
    "pp_ep_distributed": (4, f"{PP} {EP} {DISTRIBUTED}"),
}

# (system, saved under, continued under)
Case = tuple[str, str, str]
NOTICED: Case = ("transformer", "pp_distributed", "interleaved")
"""Always made: a test without a case looks at its steps."""
# What a change of layout may lose: padding, an optimizer's parts, pipeline stages, experts, prices.
FAST: list[Case] = [
    NOTICED,
    # A stage of one layer: its bucket has padding, and the tied embedding's follows it.
    ("transformer", "interleaved_distributed", "pp"),
    ("transformer_bf16", "dp_distributed", "dp"),
    ("smlp", "ep_distributed", "tp"),
    ("smlp", "ep_distributed", "pp"),
    ("smlp_partial", "pp", "ep"),
    ("smlp_partial", "pp", "tp_distributed"),
]
SHORT: list[Case] = [
    *FAST,
    ("transformer", "dp_distributed", "tp"),
    ("transformer_bf16", "dp", "dp_parallel_load"),
]
# Cases whose checkpoint tools/convert_checkpoint.py first rewrites for the new layout.
REWRITTEN: dict[Case, dict[str, int]] = {
    ("transformer", "dp_distributed", "tp"): {"tensor_model_parallel_size": 2},
    ("smlp", "ep_distributed", "pp"): {"pipeline_model_parallel_size": 2},
}


def ring(system: str) -> list[Case]:
    """Return cases in which every layout is resumed under the next, the last under the first."""
    names = [name for name, (_, flags) in LAYOUTS.items() if EP not in flags or system in ROUTED]
    return [(system, *pair) for pair in itertools.pairwise([*names, names[0]])]


def changed_shares(old: Path, new: Path) -> list[float]:
    """Return the largest difference of an expert's share of choices, for each of the last steps."""
    pairs = zip(_shares(old)[SAVED:], _shares(new), strict=True)
    return [
        max((abs(b - a) for a, b in zip(here, there, strict=True)), default=0.0)
        for here, there in pairs
    ]


def _shares(run: Path) -> list[list[float]]:
    """Return for each step the shares of the experts of all routers."""
    return [
        [share for router in record.get("routers", ()) for share in router["load_share"]]
        for record in records(run)
        if "loss" in record
    ]


class Runs:
    """Makes the runs that the cases need: those that save, then those that resume them."""

    def __init__(self, folder: Path, cases: list[Case]) -> None:
        self.folder = folder
        self.strings = strings(folder / "tokenizer")
        for planned in (dict.fromkeys(case[:2] for case in cases), cases):
            for processes in (4, 2, 1):
                runs = [one for one in planned if LAYOUTS[one[-1]][0] == processes]
                named = {"/".join(one): self._flags(*one) for one in runs}
                launch(named, processes=processes, folder=folder)

    def _flags(self, system: str, source: str, target: str | None = None) -> str:
        saved = self.folder / system / source / "saved"
        if target is None:
            where = f"--save {saved} --save-interval {SAVED} {LAYOUTS[source][1]}"
        else:
            load = self._rewritten(saved, (system, source, target))
            where = f"--load {load} --ckpt-step {SAVED} {LAYOUTS[target][1]}"
        tokenizer = self.strings if system.startswith("minhash") else NUMBERS
        return f"{MODEL} {tokenizer} {SYSTEMS[system]} {where}"

    def _rewritten(self, saved: Path, case: Case) -> Path:
        """Return the checkpoint that a case loads, rewritten if need be."""
        if case not in REWRITTEN:
            return saved
        folder = self.folder / "-".join(case)
        changes = {"ckpt_step": SAVED, "layout": REWRITTEN[case]}
        run(convert.torch_dist_to_torch_dist, saved, folder, **changes)
        return folder

    def check(self, system: str, source: str, target: str) -> None:
        saved = self.folder / system / source
        continued = saved / target
        old, new = steps(saved)[SAVED:], steps(continued)
        assert len(old) == len(new) == LAST - SAVED
        changed = changed_shares(saved, continued)
        for step, (here, there) in enumerate(zip(old, new, strict=True)):
            assert changed[step] <= (CHANGED_SHARE if step > 0 else 0.0)
            rounded = step > 0 and ("bf16" in system or any(changed[: step + 1]))
            tolerance = ROUNDED_TOLERANCE if rounded else TOLERANCE
            assert there.loss == pytest.approx(here.loss, rel=TOLERANCE)
            assert there.grad_norm == pytest.approx(here.grad_norm, rel=tolerance)


@pytest.fixture(scope="module")
def short(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    asked = selected(request, "system", "source", "target") | {NOTICED}
    folder = tmp_path_factory.mktemp("resharding")
    return Runs(folder, [case for case in SHORT if case in asked])


@pytest.mark.parametrize(("system", "source", "target"), slow_unless_in(FAST, SHORT))
def test_the_next_steps_are_those_of_the_old_layout(
    short: Runs, system: str, source: str, target: str
) -> None:
    short.check(system, source, target)


def test_the_comparison_would_notice_a_fresh_optimizer(short: Runs) -> None:
    """Neighbouring steps differ by far more than the tolerance."""
    for earlier, later in itertools.pairwise(steps(short.folder.joinpath(*NOTICED[:2]))):
        assert abs(later.grad_norm / earlier.grad_norm - 1) > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("system", [name for name in SYSTEMS if "bf16" not in name])
def test_every_system_goes_on_under_every_layout(tmp_path: Path, system: str) -> None:
    runs = Runs(tmp_path, ring(system))
    for case in ring(system):
        runs.check(*case)
