"""No system reads a parameter before waiting for its all-gather (--overlap-param-gather).

Buckets are small, so that few parameters are gathered together: a parameter that happens to share
the bucket of a module that was called would be found gathered by luck.
"""

from pathlib import Path

import pytest
from support.language_models import strings
from support.launches import launch, records
from support.systems import SYSTEMS as FLAGS

MODEL = """
    --mock-data --num-layers 4 --hidden-size 32 --ffn-hidden-size 128 --seq-length 32
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 1 --global-batch-size 2
    --num-workers 0 --lr 1e-3 --log-interval 1 --eval-iters 1 --eval-interval 2 --train-iters 3
    --ddp-bucket-size 2000 --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather
"""
NUMBERS = "--tokenizer-type NullTokenizer --vocab-size 500"
MINHASH = "--architecture mixer --input-projection minhash --filter-size 64"
SYSTEMS = {
    **FLAGS,
    "mixer": "--architecture mixer --mixer-expansion",
    "minhash": MINHASH,
    "gmlp_toeplitz": "--architecture gmlp --toeplitz --recompute-granularity selective",
    "smlp_partial_toeplitz": f"{FLAGS['smlp_partial']} --toeplitz",
}
INTERLEAVED = """
    --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1
    --global-batch-size 4
"""
WAYS = {"aligned": "", "each": "--no-align-param-gather"}
# A gate next to attention, and both kinds of experts.
FAST = ["amlp", "smlp_deterministic"]


def with_tokenizer(flags: str, folder: Path) -> str:
    return f"{MODEL} {strings(folder / 'tokenizer') if MINHASH in flags else NUMBERS} {flags}"


@pytest.mark.parametrize(
    "systems",
    [
        FAST,
        pytest.param([name for name in SYSTEMS if name not in FAST], marks=pytest.mark.slow),
    ],
    ids=["two", "the others"],
)
def test_two_data_parallel_ranks(tmp_path: Path, systems: list[str]):
    runs = {name: with_tokenizer(SYSTEMS[name], tmp_path) for name in systems}
    launch(runs, processes=2, folder=tmp_path, GATHER_PROBE="1")
    for name in systems:
        assert [r["iteration"] for r in records(tmp_path / name) if "loss" in r] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_interleaved_pipelines(tmp_path: Path):
    runs = {
        f"{name}_{way}": with_tokenizer(f"{flags} {INTERLEAVED} {aligned}", tmp_path)
        for name, flags in SYSTEMS.items()
        for way, aligned in WAYS.items()
    }
    launch(runs, processes=4, folder=tmp_path, GATHER_PROBE="1")
    for name in runs:
        assert [r["iteration"] for r in records(tmp_path / name) if "loss" in r] == [1, 2, 3]
