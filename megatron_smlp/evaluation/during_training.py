"""Score zero-shot tasks between two training steps (--eval-tasks), in the layout of the run.

Scoring must not affect the training: random states, router statistics and the capacity factor are
restored afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_smlp.collectives import from_first_rank
from megatron_smlp.data.tokenizers.factory import bare, read_tokenizer, start_of
from megatron_smlp.data.tokenizers.spec import TokenizerSpec
from megatron_smlp.errors import DataError, UsageError, require_package
from megatron_smlp.evaluation.reports import as_record, task_texts
from megatron_smlp.evaluation.selection import select_tasks, split_names
from megatron_smlp.library_logging import quiet_libraries
from megatron_smlp.routers.statistics import RouterStatistics


def tasks_of(args: argparse.Namespace, statistics: RouterStatistics) -> TaskEvaluation | None:
    """Return the evaluation of --eval-tasks, or None without that flag."""
    return TaskEvaluation(args, statistics) if args.eval_tasks else None


class TaskEvaluation:
    """The zero-shot tasks of a run; `scores` is collective.

    Raises:
        UsageError: lm-evaluation-harness, a task or its data is missing, or the tokenizer does not
            encode text.
    """

    def __init__(self, args: argparse.Namespace, statistics: RouterStatistics) -> None:
        require_package("lm_eval", purpose="--eval-tasks", extra="'megatron-smlp[eval]'")
        self.args = args
        self.statistics = statistics
        names = split_names(args.eval_tasks, flag="--eval-tasks")
        with quiet_libraries(), _own_random_numbers():
            self.selection = select_tasks(names, data_dir=args.eval_tasks_data_dir)
        try:
            self.tokenizer = read_tokenizer(bare(TokenizerSpec.from_arguments(args)))
        except DataError as error:
            raise UsageError(f"--eval-tasks: {error}") from error
        if self.tokenizer.identity is None:
            raise UsageError(
                f"--eval-tasks {args.eval_tasks} needs a text tokenizer, not --tokenizer-type "
                f"{args.tokenizer_type}"
            )

    def built(self, model: Sequence[Any]) -> None:
        """Keep the model to score; see the protocol in training/events.py.

        Raises:
            UsageError: a task cannot be scored, which would end the run at the first scoring.
        """
        from megatron_smlp.evaluation.harness import check_tasks

        self.model = list(model)
        with quiet_libraries(), _own_random_numbers():
            check_tasks(self._scored(), self.selection)

    def _scored(self) -> Any:
        """Return the model, wrapped for the harness."""
        from megatron_smlp.evaluation.harness import ScorerModel
        from megatron_smlp.evaluation.megatron_scorer import MegatronScorer

        args = self.args
        scorer = MegatronScorer(
            self.model, longest=args.seq_length, batch_size=args.micro_batch_size
        )
        return ScorerModel(scorer, self.tokenizer, start=start_of(self.tokenizer, args))

    def is_due(self, iteration: int) -> bool:
        """Return whether to score now: at multiples of the interval, and after the last step."""
        interval = self.args.eval_tasks_interval
        return bool(iteration == self.args.train_iters or (interval and iteration % interval == 0))

    def scores(self) -> tuple[dict[str, dict[str, float | None]], list[str]]:
        """Score all tasks; return the record and the console's texts, the same on every rank."""
        from megatron_smlp.evaluation.harness import run_tasks

        limit = self.args.eval_tasks_limit
        with (
            quiet_libraries(),
            _own_random_numbers(),
            _no_capacity(self.model),
        ):
            results = list(run_tasks(self._scored(), self.selection, limit=limit))
            self.statistics.take(training=False)  # routing here is part of no validation
        # The harness has results only on the first rank of each node; the last rank writes the
        # curves.
        return from_first_rank((as_record(results), task_texts(results)))


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Restore all random states on exit: libraries draw numbers, and some set a seed."""
    ours, numpys = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


@contextlib.contextmanager
def _no_capacity(model: Sequence[nn.Module]) -> Iterator[None]:
    """Drop no token: a score must not depend on what else is in its batch."""
    before = {
        id(module.config): (module.config, module.config.moe_eval_capacity_factor)
        for stage in model
        for module in stage.modules()
        if hasattr(getattr(module, "config", None), "moe_eval_capacity_factor")
    }
    for config, _ in before.values():
        config.moe_eval_capacity_factor = None
    try:
        yield
    finally:
        for config, factor in before.values():
            config.moe_eval_capacity_factor = factor
