"""One run around Megatron's loop: its reports, saves and signals, and the guard of its updates."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial

from megatron_smlp.checkpoints.claim import DONE
from megatron_smlp.checkpoints.folders import is_same_folder
from megatron_smlp.checkpoints.loading import choose_checkpoint
from megatron_smlp.checkpoints.saving import Saving
from megatron_smlp.launching.parent import end_with_parent
from megatron_smlp.megatron_patches import checkpointing, rank_messages, tensorboard, training_loop
from megatron_smlp.platform import allocator, cpu
from megatron_smlp.training.agreement import StepAgreement
from megatron_smlp.training.nonfinite import may_update
from megatron_smlp.training.reporting import Reporter, Tasks
from megatron_smlp.training.signals import StartUp, graceful_signals
from megatron_smlp.training.step import ForwardStep

type Observe = Callable[[training_loop.Observer], training_loop.Observer]


class Run:
    """One `megatron.training.pretrain`.

    Args:
        tasks: to score during training.
        start_up: is over when the model is loaded and the datasets are built.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        step: ForwardStep,
        tasks: Tasks | None = None,
        start_up: StartUp | None = None,
    ) -> None:
        self.args = args
        start_up = start_up or StartUp()
        self.reporter = Reporter(
            args,
            step=step,
            tasks=tasks,
            reached=lambda iteration: self.saving.reached(iteration),
            begins=start_up.over,
        )
        self.say = self.reporter.say
        self.saving = Saving(args, self.reporter)
        start_up.before_ending = lambda: self.saving.release(DONE)
        self.agreement = StepAgreement(args, pop_nonfinite=step.pop_nonfinite)

    @contextlib.contextmanager
    def observed(self, observe: Observe = lambda own: own) -> Iterator[None]:
        """Put everything in its place around the loop; `observe` may wrap the reporter."""
        if cpu.needed():
            allocator.keep_freed_memory()
        with (
            tensorboard.installed(self.args.tensorboard_dir),
            graceful_signals(announces=self.args.rank == 0),
            rank_messages.installed(self.agreement.take),
            training_loop.installed(
                observe(self.reporter),
                may_update=lambda norm: may_update(self.args, self.agreement, self.say, norm),
                before_update=self.agreement.send,
                begins=self.reporter.ready,
            ),
            checkpointing.installed(
                self.saving,
                before_loading=self._before_loading,
                # It holds this rank's GPU, which a restart needs, and nobody would commit its work.
                before_writing=partial(end_with_parent, signal.SIGKILL, parent=os.getpid()),
            ),
            self.saving.session(),
            self.reporter.session(),
        ):
            yield

    def _before_loading(self) -> None:
        self.saving.claim()
        damaged = choose_checkpoint(self.args, self.say)
        if is_same_folder(self.args.load, self.args.save):
            self.saving.damaged = damaged
