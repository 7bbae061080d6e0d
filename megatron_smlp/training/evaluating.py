"""Evaluate the model on each dataset of a run, in every mode that is asked for.

One pass is Megatron's `evaluate`: forward passes in evaluation mode, sums over all ranks. With
--base-eval-both there is a second pass over the same samples, whose losses have a prefix.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.training.training import evaluate
from torch import Tensor

from megatron_smlp.routers.base import other_evaluation
from megatron_smlp.training.batches import EvaluationSet
from megatron_smlp.training.events import Evaluation, Listener
from megatron_smlp.training.forward import ForwardStep
from megatron_smlp.training.parts import Parts


class Evaluator:
    """Evaluates between steps. Every call is collective.

    Args:
        forward: the loss of a micro-batch, and what the routers did in it.
        listener: is told of each dataset.
    """

    def __init__(self, parts: Parts, *, forward: ForwardStep, listener: Listener) -> None:
        self.parts, self.forward, self.listener = parts, forward, listener
        self.seen: set[tuple[str, int]] = set()
        """Title and iteration of what was evaluated: at the end nothing is evaluated again."""

    def __call__(self, sets: Sequence[EvaluationSet], iteration: int) -> None:
        """Evaluate what has not been evaluated at this iteration."""
        for dataset in sets:
            if (dataset.title, iteration) in self.seen:
                continue
            evaluation = self._evaluation(dataset, iteration)
            if evaluation is None:  # the time of the run is over
                return
            self.seen.add((dataset.title, iteration))
            self.listener.evaluated(evaluation)

    def _evaluation(self, dataset: EvaluationSet, iteration: int) -> Evaluation | None:
        start = time.perf_counter()
        losses: dict[str, Tensor] = {}
        loads: dict[str, Any] = {}
        for prefix, context in self._passes():
            with context:
                means, _, out_of_time = evaluate(
                    self.forward,
                    dataset.batches(),
                    self.parts.model,
                    None,
                    self.parts.config,
                    eval_iters=dataset.iterations,
                )
            if out_of_time:  # Megatron then leaves the model in evaluation mode
                for chunk in self.parts.model:
                    chunk.train()
                return None
            losses |= {f"{prefix}{name}": value for name, value in means.items()}
            loads[prefix.strip()] = self.forward.statistics.take(training=False)
        return Evaluation(
            iteration=iteration,
            title=dataset.title,
            losses=losses,
            loads=loads,
            seconds=time.perf_counter() - start,
        )

    def _passes(self) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
        """Yield the prefix of each pass, and its mode: that of --base-eval, then the other one."""
        args = self.parts.args
        yield "", contextlib.nullcontext()
        if args.base_eval_both:
            other = "greedy" if args.base_eval == "prices" else "prices"
            yield f"{other} ", other_evaluation(self.parts.model)
