"""Runs several pretrainings, one after the other, in one set of processes.

torchrun takes some ten seconds to start, so the tests put many runs into one launch:

    python -m torch.distributed.run --nproc-per-node 2 tests/support/runs.py runs.json

`runs.json` is a list of command lines for pretrain_smlp.py, with one more flag: ALWAYS_SECOND.
"""

import contextlib
import gc
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pretrain_smlp import main

ALWAYS_SECOND = "--gshard-always-uses-the-second-expert"


def without_draws(argv: list[str]) -> list[str]:
    """GShard's random numbers depend on the layout, as dropout does; what remains must not."""
    import torch

    from megatron_smlp.routers.gshard import GShardRouter

    is_fixed = ALWAYS_SECOND in argv
    GShardRouter.draw = lambda _, gates: (torch.zeros_like if is_fixed else torch.rand_like)(gates)
    return [word for word in argv if word != ALWAYS_SECOND]


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
    for argv in json.loads(Path(path).read_text(encoding="utf-8")):
        with ending_well():
            main(without_draws(argv))
        forget_run()


if __name__ == "__main__":
    try:
        run_all(sys.argv[1])
    except BaseException:
        traceback.print_exc()
        raise
