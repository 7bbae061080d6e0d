"""--profile: marks or records the steps from --profile-step-start to --profile-step-end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import configure_nvtx_profiling

from megatron_smlp.training.events import Listener, Outcome


class Profiler(Listener):
    """torch's profiler (--use-pytorch-profiler), or marks for NVIDIA's, on --profile-ranks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        ranks = args.profile_ranks
        self.is_on = bool(args.profile) and (not ranks or args.rank in ranks)
        self.recorder: Any = None
        self.marks: Any = None

    def ready(self) -> None:
        self.is_on = self.is_on and self.args.iteration < self.args.profile_step_end
        if not self.is_on:
            return
        if self.args.use_pytorch_profiler:
            self.recorder = self._recorder()
            self.recorder.start()
        self._begin(self.args.iteration)

    def stepped(self, outcome: Outcome) -> None:
        if not self.is_on:
            return
        # With --train-samples, no check ensures that profiling ends before the run does.
        if outcome.iteration in (self.args.profile_step_end, self.args.train_iters):
            self._end()
        else:
            self._begin(outcome.iteration)

    def stopping(self, iteration: int, reason: str) -> None:
        if self.is_on:
            self._end()

    def _begin(self, done: int) -> None:
        """Prepare for the step after `done` steps."""
        if self.recorder:
            self.recorder.step()
        if done != self.args.profile_step_start:
            return
        if self.args.nvtx_ranges:
            configure_nvtx_profiling(True)
        if not self.recorder:
            torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())
            self.marks = torch.autograd.profiler.emit_nvtx(record_shapes=self.args.record_shapes)
            self.marks.__enter__()

    def _end(self) -> None:
        if self.args.nvtx_ranges:
            configure_nvtx_profiling(False)
        if self.recorder:
            self.recorder.stop()
        elif self.marks:
            torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())
            self.marks.__exit__(None, None, None)
        self.is_on = False

    def _recorder(self) -> Any:
        args = self.args
        start = max(args.profile_step_start - args.iteration, 0)  # torch counts from here
        schedule = torch.profiler.schedule(
            wait=max(start - 1, 0),
            warmup=min(start, 1),
            active=args.profile_step_end - args.iteration - start,
            repeat=1,
        )
        return torch.profiler.profile(
            schedule=schedule,
            on_trace_ready=self._write,
            record_shapes=args.pytorch_profiler_collect_shapes,
            with_stack=args.pytorch_profiler_collect_callstack,
        )

    def _write(self, profile: Any) -> None:
        folder = Path(self.args.tensorboard_dir).parent / "torch_profile"
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / f"rank-{self.args.rank}.json.gz"))
