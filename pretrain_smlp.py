"""Pretrain a sparse all-MLP or one of its baselines.

    python pretrain_smlp.py --config configs/cpu/smlp_deterministic.yaml --data-path PREFIX ...
    torchrun --nproc-per-node 8 pretrain_smlp.py --config ... --tensor-model-parallel-size 2 ...

All Megatron flags keep their meaning; `--help` lists ours, `--help-all` all of them. To follow what
a training run does, in order, read megatron_smlp/training/loop.py next.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from megatron_smlp import plugin_files
from megatron_smlp.flags.help import answered
from megatron_smlp.launching.parent import AGENT_PID, end_with_agent
from megatron_smlp.launching.training_argv import given, limit_connections
from megatron_smlp.platform import choice
from megatron_smlp.program import readable_errors, whole_program
from megatron_smlp.signals import StartUp
from megatron_smlp.training.captured_output import CapturedOutput

# Imports that need torch are local: --help works without, and --platform cpu hides the GPUs first.


def main(argv: Sequence[str]) -> None:
    """Run a command line: patch -> parse -> train."""
    argv = plugin_files.load_named(argv)
    if answered(argv):  # --help
        return
    if given("--platform", argv) == "cpu":
        choice.hide_gpus()
    end_with_agent()
    with StartUp() as start_up, CapturedOutput() as output:
        if AGENT_PID not in os.environ:  # otherwise the launcher has done so
            limit_connections(argv, os.environ)
        args = patched_arguments(argv)
        if args.dry_run:
            from megatron_smlp.training.console import dry_run

            dry_run(args)
        else:
            output.open(args.log_dir, rank=args.rank)
            train(args, start_up=start_up)


def patched_arguments(argv: Sequence[str]) -> Any:
    """Apply the patches to Megatron and torch, then parse the flags."""
    from megatron_smlp.megatron_patches.late_compile import late_compile

    with late_compile():
        from megatron_smlp.flags.parse import parse_arguments
        from megatron_smlp.megatron_patches import table
        from megatron_smlp.platform import cpu

        cpu.apply()  # imports Megatron
        table.apply()
        from megatron_smlp.training import loop  # noqa: F401

        return parse_arguments(argv)


def train(args: Any, **observers: Any) -> None:
    """Check the data, then run `megatron_smlp.training.loop.train`, which gets `observers`."""
    from megatron_smlp.evaluation.during_training import tasks_of
    from megatron_smlp.training import loop
    from megatron_smlp.training.data import check_data
    from megatron_smlp.training.forward import ForwardStep

    check_data(args)
    forward = ForwardStep()
    loop.train(args, forward=forward, tasks=tasks_of(args, forward.statistics), **observers)


def run() -> None:
    """Entry point of the `smlp-pretrain` command."""
    with whole_program(), readable_errors("pretrain_smlp.py"):
        main(sys.argv[1:])


if __name__ == "__main__":
    run()
