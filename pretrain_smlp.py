"""Pretrain a sparse all-MLP or one of its baselines. Hosted by `megatron.training.pretrain`.

    python pretrain_smlp.py --config configs/cpu/smlp_deterministic.yaml --data-path PREFIX ...
    torchrun --nproc-per-node 8 pretrain_smlp.py --config ... --tensor-model-parallel-size 2 ...

All Megatron flags keep their meaning; `--help` lists ours at the end. Read on in
megatron_smlp/flags/parse.py (flags), architectures.py (what the model is), training/ (the step).
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_smlp.megatron_patches.training_loop import Observer
    from megatron_smlp.training.reporting import Reporter


def main(argv: list[str]) -> None:
    from megatron_smlp.flags.help import print_help, wants_help
    from megatron_smlp.platform import choice

    if wants_help(argv):
        print_help()
        return
    if argv == ["--version"]:
        from megatron_smlp.command_line import VERSION

        print(VERSION)
        return
    choice.choose(argv)
    # Imports stay inside: the checkpoint's helper process, being spawned, imports this file again.
    from megatron_smlp.training.captured_output import Transcript

    with Transcript() as transcript:
        from megatron_smlp.megatron_patches.late_compile import late_compile

        with late_compile():
            from megatron_smlp.flags.parse import parse_arguments

        args = parse_arguments(argv)
        if args.dry_run:
            dry_run(args)
            return
        transcript.open(args.log_dir, rank=args.rank)
        train(args)


def dry_run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_smlp.training.captured_output import terminal
    from megatron_smlp.training.start_screen import print_dry_run

    if args.rank == 0:
        print_dry_run(args, Console(file=terminal(), highlight=False, soft_wrap=True))


def train(
    args: argparse.Namespace, *, observe: Callable[["Reporter"], "Observer"] = lambda own: own
) -> None:
    """Run `megatron.training.pretrain`; `observe` may put another observer around the reporter."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from torch.distributed import HashStore

    from megatron_smlp.checkpoints.loading import choose_checkpoint
    from megatron_smlp.checkpoints.saving import Saving
    from megatron_smlp.megatron_patches import checkpointing, training_loop
    from megatron_smlp.model import model_config
    from megatron_smlp.platform import allocator, cpu
    from megatron_smlp.training.data import DatasetProvider, check_data
    from megatron_smlp.training.reporting import Reporter
    from megatron_smlp.training.signals import graceful_signals
    from megatron_smlp.training.step import ForwardStep

    if cpu.needed():
        allocator.keep_freed_memory()
    check_data(args)
    step = ForwardStep()
    tasks = None
    if args.eval_tasks:
        from megatron_smlp.evaluation.during_training import TaskEvaluation

        tasks = TaskEvaluation(args, step.statistics)
    reporter = Reporter(args, step=step, tasks=tasks)
    saving = Saving(args, reporter)
    speaks = args.rank == 0
    with (
        graceful_signals(speaks=speaks),
        training_loop.installed(observe(reporter)),
        checkpointing.installed(
            saving, before_loading=lambda: choose_checkpoint(args, reporter.say)
        ),
        saving.session(),
        reporter.session(),
    ):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config(args)),
            DatasetProvider(reporter.say),
            ModelType.encoder_or_decoder,
            step,
            store=None if "MASTER_ADDR" in os.environ else HashStore(),  # one process, no torchrun
        )


if __name__ == "__main__":
    from megatron_smlp.errors import readable_errors, undisturbed_exit

    with undisturbed_exit(), readable_errors("pretrain_smlp.py"):
        main(sys.argv[1:])
