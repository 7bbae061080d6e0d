"""Pretrain a sparse all-MLP or one of its baselines. Hosted by `megatron.training.pretrain`.

    python pretrain_smlp.py --config configs/cpu/smlp_deterministic.yaml --data-path PREFIX ...
    torchrun --nproc-per-node 8 pretrain_smlp.py --config ... --tensor-model-parallel-size 2 ...

All Megatron flags keep their meaning; `--help` lists ours, `--help-all` every one. Read on in
megatron_smlp: flags/parse.py, systems.py, megatron_patches/table.py, training/run.py.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_smlp.flags import early
from megatron_smlp.flags.help import answered
from megatron_smlp.launching.parent import AGENT_PID
from megatron_smlp.launching.training_words import limit_connections
from megatron_smlp.platform import choice
from megatron_smlp.program import readable_errors, undisturbed_exit
from megatron_smlp.training.captured_output import CapturedOutput
from megatron_smlp.training.signals import StartUp

# What imports torch is imported inside: --help does without, --platform cpu hides the GPUs before.


def main(argv: Sequence[str]) -> None:
    """Run a command line: patch -> parse -> check the data -> observe -> pretrain."""
    if answered(argv):  # --help, --version
        return
    early.refuse(argv)
    choice.choose(argv)
    with StartUp() as start_up, CapturedOutput() as output:
        if AGENT_PID not in os.environ:  # else its launcher has
            limit_connections(argv, os.environ)
        args = patched_arguments(argv)
        if args.dry_run:
            from megatron_smlp.training.console import dry_run

            with args.thawed():
                configuration(args)
            dry_run(args)
        else:
            output.open(args.log_dir, rank=args.rank)
            train(args, start_up=start_up)


def patched_arguments(argv: Sequence[str]) -> Any:
    """Put what is replaced in Megatron and torch in its place, and parse the flags."""
    from megatron_smlp.megatron_patches.late_compile import late_compile

    with late_compile():
        from megatron_smlp.flags.parse import parse_arguments
        from megatron_smlp.megatron_patches import table
        from megatron_smlp.platform import cpu

        cpu.apply()  # which imports Megatron
        table.apply()
        return parse_arguments(argv)


def configuration(args: Any) -> Any:
    """Return Megatron's configuration of the run, which refuses some flags as it is made."""
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_smlp.flags.check import megatrons_refusals
    from megatron_smlp.model import model_config

    with megatrons_refusals():
        return pretrain_cfg_container_from_args(args, model_config(args))


def train(
    args: Any, *, observe: Callable[[Any], Any] = lambda own: own, start_up: Any = None
) -> None:
    """Run `megatron.training.pretrain`; `observe` may put another observer around the reporter."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_smlp.evaluation.during_training import tasks_of
    from megatron_smlp.training.data import DatasetProvider, check_data
    from megatron_smlp.training.run import Run
    from megatron_smlp.training.same_everywhere import run_store
    from megatron_smlp.training.step import ForwardStep

    check_data(args)
    step = ForwardStep()
    tasks = tasks_of(args, step.statistics)
    run = Run(args, step=step, tasks=tasks, start_up=start_up)
    with args.thawed(), run.observed(observe):
        config = configuration(args)
        kind, store = ModelType.encoder_or_decoder, run_store(args)
        pretrain(config, DatasetProvider(run.say), kind, step, store=store)


def run() -> None:
    """The command `smlp-pretrain`."""
    with undisturbed_exit(), readable_errors("pretrain_smlp.py"):
        main(sys.argv[1:])


if __name__ == "__main__":
    run()
