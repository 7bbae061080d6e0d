"""One run of lm-evaluation-harness: a model, tasks, what came out."""

from __future__ import annotations

from typing import Any

from megatron_smlp.evaluation.results import TaskResult, from_harness
from megatron_smlp.evaluation.selection import Selection


def run_tasks(model: Any, selection: Selection, *, limit: int | None) -> list[TaskResult]:
    """Score every example of the tasks, zero-shot.

    Args:
        model: a `lm_eval.api.model.LM`.
        limit: examples per task, the first ones; None: all.

    Returns:
        a result per task; nothing on ranks that the harness gives none.
    """
    import lm_eval

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=selection.tasks,
        task_manager=selection.manager,
        num_fewshot=0,
        limit=limit,
        log_samples=True,
        random_seed=None,  # nothing is drawn, and a training around this goes on with its seeds
        numpy_random_seed=None,
        torch_random_seed=None,
        bootstrap_iters=1000,
    )
    return [] if results is None else from_harness(results)
