"""Megatron's chores between steps: garbage collection, replica checks, device syncs, timeouts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from datetime import timedelta

import torch
from megatron.core.parallel_state import update_pg_timeout
from megatron.core.utils import check_param_hashes_across_dp_replicas
from megatron.training.utils import print_rank_0

from megatron_smlp.training.overlaps import ParameterGathering
from megatron_smlp.training.parts import Parts


class Upkeep:
    """See the module docstring. Every call is collective."""

    def __init__(self, parts: Parts, gathering: ParameterGathering) -> None:
        self.args, self.model, self.gathering = parts.args, parts.model, gathering
        self.is_first = True

    def begin(self) -> None:
        """Prepare for the first step."""
        for chunk in self.model:
            chunk.train()
        if self.args.manual_gc:  # all ranks collect at the same steps, and so wait only once
            gc.disable()
            gc.collect()
        if self.args.check_weight_hash_across_dp_replicas_interval is not None:
            self._compare_replicas(self.args.iteration)

    def after_step(self, iteration: int) -> None:
        """Run what is due after a step and its evaluations."""
        args = self.args
        if self.is_first and args.distributed_timeout_seconds_after_init is not None:
            update_pg_timeout(timedelta(seconds=args.distributed_timeout_seconds_after_init))
        self.is_first = False
        if is_due(args.train_sync_interval, iteration):
            torch.cuda.synchronize()
        if is_due(args.check_weight_hash_across_dp_replicas_interval, iteration):
            with self.gathering.whole():
                self._compare_replicas(iteration)
        if args.manual_gc and is_due(args.manual_gc_interval, iteration):
            gc.collect()

    @contextlib.contextmanager
    def clean(self) -> Iterator[None]:
        """Collect garbage around an evaluation (--manual-gc)."""
        collects = self.args.manual_gc and self.args.manual_gc_eval
        if collects:
            gc.collect()
        yield
        if collects:
            gc.collect(generation=0)

    def _compare_replicas(self, iteration: int) -> None:
        are_same = check_param_hashes_across_dp_replicas(self.model, cross_check=True)
        assert are_same, "Parameter hashes not matching across DP replicas"
        torch.distributed.barrier()
        print_rank_0(f">>> Weight hashes match after {iteration} iterations...")


def is_due(interval: int | None, iteration: int) -> bool:
    """Return whether the iteration is a multiple of the interval; never for 0 and None."""
    return bool(interval) and iteration % int(interval or 1) == 0
