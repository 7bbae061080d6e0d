"""Evaluates the model on each dataset of a run with Megatron's `evaluate`: forward passes in
evaluation mode, sums over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.training.global_vars import get_timers
from megatron.training.training import evaluate

from megatron_smlp.training.batches import EvaluationSet
from megatron_smlp.training.events import Evaluation, Listener
from megatron_smlp.training.forward import ForwardStep
from megatron_smlp.training.parts import Parts


class Evaluator:
    """Evaluates between steps. Every call is collective.

    Args:
        forward: computes the loss of a micro-batch, and collects router statistics.
        listener: notified of each dataset's evaluation.
    """

    def __init__(self, parts: Parts, *, forward: ForwardStep, listener: Listener) -> None:
        self.parts, self.forward, self.listener = parts, forward, listener
        self.seen: set[tuple[str, int]] = set()
        """Title and iteration of past evaluations, so that the end of the run repeats none."""

    def __call__(self, sets: Sequence[EvaluationSet], iteration: int) -> bool:
        """Evaluate the sets not yet evaluated at this iteration; False if the run's time is up."""
        for dataset in sets:
            if (dataset.title, iteration) in self.seen:
                continue
            evaluation = self._evaluation(dataset, iteration)
            if evaluation is None:
                return False
            self.seen.add((dataset.title, iteration))
            self.listener.evaluated(evaluation)
        return True

    def _evaluation(self, dataset: EvaluationSet, iteration: int) -> Evaluation | None:
        start = time.perf_counter()
        with self._batch_of(dataset):
            losses, _, out_of_time = evaluate(
                self.forward,
                dataset.batches(),
                self.parts.model,
                None,
                self.parts.config,
                eval_iters=dataset.iterations,
            )
        if out_of_time:  # Megatron then leaves the model in evaluation mode, and its timer on
            get_timers()("evaluate").stop()
            for chunk in self.parts.model:
                chunk.train()
            return None
        return Evaluation(
            iteration=iteration,
            title=dataset.title,
            losses=losses,
            loads=self.forward.statistics.take(training=False),
            seconds=time.perf_counter() - start,
        )

    @contextmanager
    def _batch_of(self, dataset: EvaluationSet) -> Iterator[None]:
        """Make Megatron read batches of the dataset's own size inside the block."""
        args = self.parts.args
        size = args.eval_global_batch_size
        if dataset.micro_batches:
            rows = dataset.micro_batches * args.eval_micro_batch_size
            args.eval_global_batch_size = rows * args.data_parallel_size
        try:
            yield
        finally:
            args.eval_global_batch_size = size
