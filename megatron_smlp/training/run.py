"""What lives as long as a run, from its first line to its last: folder, screen, listeners."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from megatron_smlp.checkpoints.saving import Saving
from megatron_smlp.launching.parent import end_with_parent
from megatron_smlp.megatron_patches import checkpoint_files
from megatron_smlp.platform import allocator, cpu
from megatron_smlp.plugins import register
from megatron_smlp.signals import graceful_signals
from megatron_smlp.training.events import Listener, Listeners
from megatron_smlp.training.forward import ForwardStep
from megatron_smlp.training.megatron_log import MegatronLog
from megatron_smlp.training.profiling import Profiler
from megatron_smlp.training.reporting import Reporter
from megatron_smlp.training.tensorboard_wandb import Writers


class Run:
    """See the module docstring."""

    def __init__(
        self, args: argparse.Namespace, *, forward: ForwardStep, listeners: Sequence[Listener]
    ) -> None:
        self.args, self.forward = args, forward
        self.writers = Writers(args)
        self.reporter = Reporter(args, forward=forward, writers=self.writers)
        # A surviving writer would hold this rank's GPU, for a save that nobody would commit.
        end = partial(end_with_parent, signal.SIGKILL, parent=os.getpid())
        self.saving = Saving(args, self.reporter, before_writing=end)
        own = (self.reporter, MegatronLog(args, self.writers), Profiler(args))
        plugged = (kind() for kind in register.listeners)
        self.listeners = Listeners((*own, *plugged, *listeners))

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold the signal handlers, the folder and the screen for the duration of a run."""
        if cpu.needed():
            allocator.keep_freed_memory()
        with ExitStack() as stack:
            stack.enter_context(graceful_signals(announces=self.args.rank == 0))
            stack.enter_context(checkpoint_files.installed(self.saving.note))
            stack.enter_context(self.saving.session())
            stack.enter_context(self.reporter.session())
            yield
        self.writers.close()
