"""Four steps in one go, and two, a resume and two more, end in the same bits.

Compares every tensor of the last checkpoint (weights and optimizer state), and loss and gradient
norm of every step in metrics.jsonl, including the first one after a resume.
"""

from pathlib import Path

import pytest
import torch
from support.checkpoints import checkpoint_tensors
from support.cover import selected, slow_unless_in
from support.language_models import strings
from support.launches import launch, steps

BASE = (
    "--mock-data --num-layers 4 --hidden-size 64 --ffn-hidden-size 256 --num-attention-heads 4 "
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 "
    "--lr-warmup-fraction 0.2 --eval-iters 1 --eval-interval 2 --log-interval 1 --num-workers 0 "
    "--seed 1 --save-interval 100"
)
MOE = "--num-experts 4 --moe-token-dispatcher-type alltoall"
SMLP = (
    f"--architecture smlp --num-dense-layers 2 --spatial-heads 2 --feature-router deterministic "
    f"--num-feature-experts 4 --token-router base {MOE}"
)
MINHASH = "--input-projection minhash --filter-size 64 --window 2"
MUP = "--use-mup --mup-base-hidden-size 16 --mup-base-head-dim 4"
NUMBERS = "--tokenizer-type NullTokenizer --vocab-size 500"
ARCHITECTURES = {
    "transformer": "--architecture transformer",
    "transformer_gshard": (
        f"--architecture transformer --moe-layer-freq 2 --token-router gshard {MOE} "
        "--moe-train-capacity-factor 1"
    ),
    "transformer_hash": (
        f"--architecture transformer --moe-layer-freq 2 --token-router hash {MOE}"
    ),
    "gmlp": "--architecture gmlp",
    "amlp": "--architecture amlp --tiny-attention-width 16",
    "mixer": "--architecture mixer --spatial-heads 2 --mixer-expansion",
    "minhash_base": f"--architecture mixer {MINHASH} --token-router base {MOE}",
    "smlp": SMLP,
    "smlp_partial": SMLP.replace("deterministic", "partial"),
}
DROPOUT = {
    "exact": "--attention-dropout 0 --hidden-dropout 0",
    "dropout": "--attention-dropout 0.1 --hidden-dropout 0.1",
}
ONE_PROCESS = {
    f"{name}_{kind}": f"{flags} {dropout}"
    for name, flags in ARCHITECTURES.items()
    for kind, dropout in DROPOUT.items()
} | {
    "gmlp_toeplitz_exact": f"--architecture gmlp --toeplitz {DROPOUT['exact']}",
    "amlp_rope_exact": f"--architecture amlp --position-embedding-type rope {DROPOUT['exact']}",
    "transformer_mup_exact": f"--architecture transformer {MUP} {DROPOUT['exact']}",
}
TWO_PROCESSES = {
    "smlp_tp2_dropout": f"{SMLP} {DROPOUT['dropout']} --tensor-model-parallel-size 2",
    "gmlp_dp2_fp32": f"--architecture gmlp {DROPOUT['exact']} --use-distributed-optimizer",
    "gmlp_dp2_bf16": (
        f"--architecture gmlp {DROPOUT['exact']} --bf16 --use-distributed-optimizer "
        "--ckpt-fully-parallel-save"
    ),
}
# Dropout tests random state on top of everything exact; what a resume restores is the same for all
# mixers. Two processes run the deterministic router, with dropout, and plain gMLP.
FAST = ("transformer_gshard_dropout", "smlp_tp2_dropout", "gmlp_dp2_bf16")
CASES = slow_unless_in(FAST, [*ONE_PROCESS, *TWO_PROCESSES])


def plan(cases: dict[str, str], folder: Path) -> dict[str, str]:
    """Plan for each case one run of 4 steps, and two that stop after 2 and 4."""
    runs: dict[str, str] = {}
    for name, system in cases.items():
        flags = f"{system} {strings(folder / 'tokenizer') if MINHASH in system else NUMBERS}"
        runs[f"{name}/whole"] = f"{BASE} {flags} --save {folder / name / 'whole'}"
        # Two runs write to one metrics.jsonl: launch() names the folder after the key.
        for part in ("parts", "parts/."):
            parts = f"--exit-interval 2 --save {folder / name / 'parts'}"
            runs[f"{name}/{part}"] = f"{BASE} {flags} {parts}"
    return runs


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the runs that the selected tests look at."""
    folder: Path = tmp_path_factory.mktemp("resume")
    asked = {case for (case,) in selected(request, "case")}
    for processes, cases in ((1, ONE_PROCESS), (2, TWO_PROCESSES)):
        wanted = {name: flags for name, flags in cases.items() if name in asked}
        launch(plan(wanted, folder), processes=processes, folder=folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_ends_in_the_same_bits(results: Path, case: str) -> None:
    whole, parts = (checkpoint_tensors(results / case / kind, 4) for kind in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert any(name.startswith("optimizer.") for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    logged = steps(results / case / "whole")
    assert len(logged) == 4
    assert steps(results / case / "parts") == logged
    assert min(step.loss for step in logged[1:]) < logged[0].loss  # the weights did move
