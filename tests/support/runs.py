"""Runs several pretrainings, one after the other, in one set of processes.

torchrun takes some ten seconds to start, so the tests put many runs into one launch:

    python -m torch.distributed.run --nproc-per-node 2 tests/support/runs.py runs.json

`runs.json` is a list of command lines for pretrain_smlp.py.
With CUDA_STAND_IN=1 in the environment they train on the CPU that stands in for a CUDA device;
with GATHER_PROBE=1 every parameter must have been gathered where it is read.
"""

import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

if os.environ.get("CUDA_STAND_IN"):
    from support import cuda_stand_in

    cuda_stand_in.install()

from pretrain_smlp import main  # noqa: E402


def forget_run() -> None:
    """Megatron keeps its state in module globals; drop it all but the process group."""
    import torch
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training.training import destroy_global_state

    destroy_global_state()
    destroy_moe_metrics_tracker()  # its entries hold the process groups of the last run
    # Megatron forgets its groups without ending them, and each keeps a thread of gloo's awake.
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()


@contextlib.contextmanager
def ending_well() -> Iterator[None]:
    """--exit-interval and signals end a run by exiting, with 0; so does an error, with its code."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise


def run_all(path: str) -> None:
    probes = bool(os.environ.get("GATHER_PROBE"))
    if probes:
        from support import gather_probe

        gather_probe.install()
    for argv in json.loads(Path(path).read_text(encoding="utf-8")):
        with ending_well():
            main(argv)
        if probes:
            gather_probe.assert_that_it_looked()
        forget_run()


if __name__ == "__main__":
    try:
        run_all(sys.argv[1])
    except BaseException:
        traceback.print_exc()
        raise
