"""Run several pretrainings, one after another, in one set of processes.

launches.launch() calls `run_all` in forks of a process that has imported Megatron. Where the CPU
stands in for a CUDA device, which is set up before that import, this file is a program:

    python tests/support/runs.py runs.json PROCESSES [more-runs.json PROCESSES ...]

`runs.json` is a list of command lines for pretrain_smlp.py. With GATHER_PROBE=1 every parameter
must have been gathered before it is read.
"""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def forget_run() -> None:
    """Drop the state that Megatron keeps in module globals, except the process group."""
    import torch
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training.training import destroy_global_state
    from support.quick_megatron import forget_groups

    _break_circles()
    destroy_global_state()
    destroy_moe_metrics_tracker()  # its entries hold the process groups of the last run
    # Megatron forgets its groups without ending them, and each keeps a thread of gloo's awake.
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    forget_groups()
    gc.collect()


def _break_circles() -> None:
    """Break cycles that garbage collection cannot see: an fp32 parameter's shard and a dispatcher's
    probabilities hold an autograd graph, whose hooks hold the model, which holds both."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    for found in gc.get_objects():
        if issubclass(type(found), DistributedOptimizer | MoETokenDispatcher):
            vars(found).clear()


@contextlib.contextmanager
def ending_well() -> Iterator[None]:
    """Suppress an exit with code 0, as of `--help`, but not an error's exit with its code."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise


def run_all(path: str) -> None:
    from pretrain_smlp import main

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


def run_program(flags: Sequence[str]) -> None:
    """Run pretrain_smlp.py as a program, including its handling of errors and signals."""
    import pretrain_smlp

    sys.argv = ["pretrain_smlp.py", *flags]
    with ending_well():
        pretrain_smlp.run()


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    from support.ranks import run_ranks_on_the_stand_in

    run_ranks_on_the_stand_in(
        run_all,
        [
            (int(processes), (path,), Path(path).with_suffix(".log"))
            for path, processes in zip(sys.argv[1::2], sys.argv[2::2], strict=True)
        ],
    )
