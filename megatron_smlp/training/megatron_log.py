"""Megatron's own curves in TensorBoard and W&B, and its line in megatron.log.

Names and values are those that `megatron.training` writes, so that the same tools read curves of
its runs and of ours; our own curves are added by tensorboard_wandb.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    get_num_microbatches,
)
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.training import get_timers
from megatron.training.utils import (
    calc_params_l2_norm,
    is_last_rank,
    print_rank_last,
    report_memory,
)
from torch import Tensor

from megatron_smlp.flags.check_model import slots_of
from megatron_smlp.training.events import Evaluation, Listener, Outcome
from megatron_smlp.training.parts import Parts
from megatron_smlp.training.speed import StepClock
from megatron_smlp.training.tensorboard_wandb import Writers

TIMERS = (
    "forward-backward non-tensor-parallel-grads-all-reduce embedding-grads-all-reduce "
    "all-grads-sync params-all-gather optimizer-copy-to-main-grad optimizer-unscale-and-check-inf "
    "optimizer-clip-main-grad optimizer-count-zeros optimizer-inner-step "
    "optimizer-copy-main-to-model-params optimizer",
    "batch-generator forward-compute backward-compute forward-recv forward-send backward-recv "
    "backward-send forward-send-forward-recv forward-send-backward-recv "
    "backward-send-forward-recv backward-send-backward-recv "
    "forward-backward-send-forward-backward-recv",
)
"""Timers of --timing-log-level 1, and those that level 2 adds."""
ALONE = ("skipped-train-samples", "mem-")
"""Prefixes of curves drawn against steps only; the others are drawn against samples too."""


class MegatronLog(Listener):
    """See the module docstring. W&B's and TensorBoard's writers exist on the last rank only."""

    def __init__(self, args: argparse.Namespace, writers: Writers) -> None:
        self.args, self.writers = args, writers
        self.sums: dict[str, Tensor] = {}
        """Sums of the losses since the last line."""
        self.made = self.skipped = self.nan = 0
        """Steps since the last line, by outcome."""
        self.memory_reports = 2
        """Reports still due: the first update allocates the optimizer state."""
        self.timers = " ".join(TIMERS[: args.timing_log_level]).split()
        self.clock = StepClock()
        self.have_experts = [slots.channel == "token_moe" for slots in slots_of(args)]
        """Layers that Megatron's metrics average over. It does not know --num-dense-layers."""

    def built(self, parts: Parts) -> None:
        self.parts = parts
        self.writers.write_flags(self.args)

    def ready(self) -> None:
        self.clock.restart()

    def stepped(self, outcome: Outcome) -> None:
        self.clock.step()
        self._add(outcome)
        params_norm = calc_params_l2_norm(self.parts.model) if self.args.log_params_norm else None
        if self.writers and outcome.iteration % self.args.tensorboard_log_interval == 0:
            for name, value in self._curves(outcome, params_norm):
                self._write(name, value, outcome.iteration, twice=not name.startswith(ALONE))
        experts = self._experts(outcome)
        if outcome.iteration % self.args.log_interval == 0:
            self._line(outcome, experts, params_norm)

    def _add(self, outcome: Outcome) -> None:
        if outcome.skipped:
            self.skipped += 1
            self.nan += any(not loss.isfinite() for loss in outcome.losses.values())
            return
        self.made += 1
        for name, loss in outcome.losses.items():
            self.sums[name] = self.sums.get(name, loss.new_zeros(1)) + loss

    def _write(self, name: str, value: Any, iteration: int, *, twice: bool = True) -> None:
        samples = self.args.consumed_train_samples
        self.writers.add(name, value, iteration, samples=samples if twice else None)

    def _curves(self, outcome: Outcome, params_norm: float | None) -> Iterator[tuple[str, Any]]:
        args = self.args
        # Megatron's curve shows the rate of the next step, to which its schedule has moved on.
        rate = get_canonical_lr_for_logging(self.parts.optimizer.param_groups)
        if rate is not None:
            yield "learning-rate", rate
        yield "batch-size", get_current_running_global_batch_size()
        yield from outcome.losses.items()
        if args.skipped_train_samples:
            yield "skipped-train-samples", args.skipped_train_samples
        if args.log_loss_scale_to_tensorboard:
            yield "loss-scale", outcome.loss_scale
        if args.log_world_size_to_tensorboard:
            yield "world-size", args.world_size
        numbers = {"grad-norm": outcome.grad_norm, "num-zeros": outcome.num_zeros}
        for name, value in {**numbers, "params-norm": params_norm}.items():
            if value is not None:
                yield name, value
        if args.log_memory_to_tensorboard:
            memory = torch.cuda.memory_stats()
            yield "mem-reserved-bytes", memory["reserved_bytes.all.current"]
            yield "mem-allocated-bytes", memory["allocated_bytes.all.current"]
            yield "mem-max-allocated-bytes", memory["allocated_bytes.all.peak"]
            yield "mem-allocated-count", memory["allocation.all.current"]

    def _experts(self, outcome: Outcome) -> str:
        """Write the metrics that Megatron's own router tracks, and reset their sums; those of a
        skipped step count in no mean. Collective."""
        args = self.args
        if args.num_experts is None:
            return ""
        kinds = args.moe_router_load_balancing_type
        tracked = {"load_balancing_loss": "aux_loss" in kinds, "z_loss": args.moe_z_loss_coeff}
        text: str = get_moe_metrics_tracker().report(
            loss_scale=1 / get_num_microbatches(),
            iteration=outcome.iteration,
            writer=self.writers.tensorboard,
            wandb_writer=self.writers.wandb,
            per_layer_logging=args.moe_per_layer_logging,
            force_initialize=True,
            track_names=[name for name, is_tracked in tracked.items() if is_tracked],
            num_layers=args.num_layers,
            moe_layer_freq=self.have_experts,
            mtp_num_layers=None,
            total_loss_dict=None if outcome.skipped else self.sums,
            pg_collection=self.parts.groups,
        )
        return text

    def _line(self, outcome: Outcome, experts: str, params_norm: float | None) -> None:
        args, timers = self.args, get_timers()
        seconds = self.clock.pop_seconds_per_step()
        if args.log_timers_to_tensorboard:
            self._write("iteration-time", seconds, outcome.iteration, twice=False)
        parts = [
            f" [{datetime.now():%Y-%m-%d %H:%M:%S.%f}] iteration "
            f"{outcome.iteration:8d}/{args.train_iters:8d}",
            f"consumed samples: {args.consumed_train_samples:12d}",
            f"elapsed time per iteration (ms): {seconds * 1000.0:.1f}",
        ]
        if args.skipped_train_samples:
            parts.insert(2, f"skipped samples: {args.skipped_train_samples:12d}")
        if outcome.learning_rate is not None:
            parts.append(f"learning rate: {outcome.learning_rate:.6E}")
        parts.append(f"global batch size: {get_current_running_global_batch_size():5d}")
        means = {name: float(total) / max(1, self.made) for name, total in self.sums.items()}
        parts += [f"{name}: {mean:.6E}" for name, mean in means.items()]
        parts += [experts.strip(" |")] if experts else []
        parts.append(f"loss scale: {outcome.loss_scale:.1f}")
        if outcome.grad_norm is not None:
            parts.append(f"grad norm: {outcome.grad_norm:.3f}")
        if outcome.num_zeros is not None:
            parts.append(f"num zeros: {outcome.num_zeros}")
        if params_norm is not None:
            parts.append(f"params norm: {params_norm:.3f}")
        parts.append(f"number of skipped iterations: {self.skipped:3d}")
        parts.append(f"number of nan iterations: {self.nan:3d} |")
        print_rank_last(" | ".join(parts))
        self.sums, self.made, self.skipped, self.nan = {}, 0, 0, 0
        self._memory(outcome.iteration)
        if args.log_timers_to_tensorboard:  # collective
            times = timers._get_global_min_max_time(self.timers, False, False, args.log_interval)
            for name, (_, longest) in times.items():
                self._write(f"{name}-time", longest, outcome.iteration, twice=False)
        timers.log(self.timers, normalizer=args.log_interval)

    def _memory(self, iteration: int) -> None:
        args = self.args
        if args.record_memory_history and is_last_rank():
            torch.cuda.memory._dump_snapshot(args.memory_snapshot_path)
        interval = args.log_memory_interval
        if self.memory_reports or (interval is not None and iteration % interval == 0):
            report_memory(f"(after {iteration} iterations)", process_group=self.parts.groups.dp)
            self.memory_reports = max(0, self.memory_reports - 1)

    def held_up(self, *, seconds: float) -> None:
        self.clock.exclude(seconds)

    def evaluated(self, evaluation: Evaluation) -> None:
        title = evaluation.title.replace(" ", "-")
        texts = [f" {title} loss at iteration {evaluation.iteration}"]
        for name, loss in evaluation.losses.items():
            value = float(loss)
            perplexity = math.exp(min(20, value))  # clamped as in Megatron
            texts.append(f"{name} value: {value:.6E} | {name} PPL: {perplexity:.6E}")
            self._write(f"{name} {title}", value, evaluation.iteration)
            if self.args.log_validation_ppl_to_tensorboard:
                self._write(f"{name} {title} ppl", perplexity, evaluation.iteration)
        print_rank_last(f"{' | '.join(texts)} | ")
        if self.args.num_experts is not None:
            get_moe_metrics_tracker().clear()
