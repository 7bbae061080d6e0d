"""No system reads a parameter before its gather was waited for (--overlap-param-gather).

Buckets are small, so that every few parameters are gathered by themselves: one that happens to
share the bucket of a module that was called would be found gathered by luck.
"""

from pathlib import Path

import pytest
from support.launches import launch, records
from support.systems import SYSTEMS as FLAGS

MODEL = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 500 --num-layers 4 --hidden-size 32
    --ffn-hidden-size 128 --seq-length 32 --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 1 --global-batch-size 4 --num-workers 0 --lr 1e-3 --log-interval 1
    --eval-iters 1 --eval-interval 2 --train-iters 4 --ddp-bucket-size 2000
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
"""
SYSTEMS = {
    **FLAGS,
    "gmlp_toeplitz": "--architecture gmlp --toeplitz --recompute-granularity selective",
    "smlp_partial_toeplitz": f"{FLAGS['smlp_partial']} --toeplitz",
}
INTERLEAVED = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
WAYS = {"aligned": "", "each": "--no-align-param-gather"}


def test_two_data_parallel_ranks(tmp_path: Path):
    launch(
        {name: f"{MODEL} {flags}" for name, flags in SYSTEMS.items()},
        processes=2,
        folder=tmp_path,
        GATHER_PROBE="1",
    )
    for name in SYSTEMS:
        assert [r["iteration"] for r in records(tmp_path / name) if "loss" in r] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_interleaved_pipelines(tmp_path: Path):
    runs = {
        f"{name}_{way}": f"{MODEL} {flags} {INTERLEAVED} {aligned}"
        for name, flags in SYSTEMS.items()
        for way, aligned in WAYS.items()
    }
    launch(runs, processes=4, folder=tmp_path, GATHER_PROBE="1")
    for name in runs:
        assert [r["iteration"] for r in records(tmp_path / name) if "loss" in r] == [1, 2, 3, 4]
