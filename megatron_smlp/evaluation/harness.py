"""Run lm-evaluation-harness's zero-shot tasks on a Megatron model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from megatron_smlp.data.tokenizers.spec import Tokenizer
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.fitting import Misfit, TooLong, misfits
from megatron_smlp.evaluation.megatron_scorer import MegatronScorer
from megatron_smlp.evaluation.reports import TaskResult, from_harness
from megatron_smlp.evaluation.rows import Row, RowScore
from megatron_smlp.evaluation.selection import Selection

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation), then the token ids of each."""


def run_tasks(
    model: Any, selection: Selection, *, limit: int | None, too_long: TooLong = "skip"
) -> Iterator[TaskResult]:
    """Score the examples of the tasks zero-shot, one task or group after another.

    Args:
        model: a `lm_eval.api.model.LM`.
        limit: number of examples per task, from the first; None: all.
        too_long: what to do with examples that do not fit into the model; they are named in any
            case. truncate: cut the beginning of an option; leave out what cannot be cut.

    Yields:
        a result per task, as each ends; nothing on ranks where the harness returns none.

    Raises:
        UsageError: an example does not fit and too_long is stop, or the requests of a task cannot
            be built from its file.
    """
    checked = check_tasks(model, selection, limit=limit)
    if too_long == "stop":
        for name, number, misfit in itertools.chain.from_iterable(map(_Checked.named, checked)):
            raise UsageError(
                f"--tasks {name}, example {number}: {misfit.reason}: skip such examples "
                "(--too-long skip), or evaluate a model with a longer --seq-length"
            )
    for item in checked:
        chosen = item.chosen(limit, too_long)
        empty = [name for name, numbers in chosen.items() if not numbers]
        some = {name: numbers for name, numbers in chosen.items() if numbers}
        # If one of its tasks is empty, a group's own score would not cover the tasks it names.
        scored = [item.tasks[name] for name in some] if empty else [item.item]
        results = _evaluated(model, scored, selection, some) if some else []
        results += [TaskResult(name, 0, {}, str(item.tasks[name].VERSION)) for name in empty]
        for result in results:
            misfits_of = item.misfits.get(result.task, {})
            unfit = {number: misfit.said(too_long) for number, misfit in misfits_of.items()}
            yield dataclasses.replace(result, unfit=unfit)


def check_tasks(model: Any, selection: Selection, *, limit: int | None) -> list[_Checked]:
    """Check all tasks up front, before hours of scoring or training.

    Raises:
        UsageError: a task needs a model that generates text, or its requests cannot be built.
    """
    return [_Checked.of(item, model, selection, limit) for item in selection.tasks]


@dataclass(frozen=True)
class _Checked:
    """A task or a group, and those of its examples that do not fit into the model."""

    item: Any
    tasks: Mapping[str, Any]
    """By name: the task itself, or the tasks of the group."""
    misfits: Mapping[str, Mapping[int, Misfit]]
    """By task, then by the number of the example."""

    @classmethod
    def of(cls, item: Any, model: Any, selection: Selection, limit: int | None) -> _Checked:
        tasks = selection.manager.load([item])["tasks"]
        unfit = {}
        for name, task in tasks.items():
            if isinstance(model, ScorerModel) and task.OUTPUT_TYPE == "generate_until":
                model.generate_until([])
            task.set_config(key="num_fewshot", value=0)
            try:
                unfit[name] = misfits(task, model, limit=limit)
            except UsageError:
                raise
            except Exception as error:  # any kind: prompts and code are not ours
                raise selection.broken(name, error) from error
        return cls(item, tasks, unfit)

    def named(self) -> Iterator[tuple[str, int, Misfit]]:
        for name, numbered in self.misfits.items():
            yield from ((name, number, misfit) for number, misfit in numbered.items())

    def chosen(self, limit: int | None, too_long: TooLong) -> dict[str, Sequence[int]]:
        """Return the numbers of the examples to score, by task."""
        chosen: dict[str, Sequence[int]] = {}
        for name, task in self.tasks.items():
            unfit, count = self.misfits[name], len(task.eval_docs)
            numbers = range(count if limit is None else min(limit, count))
            left_out = {number for number in unfit if not unfit[number].is_cut(too_long)}
            # The harness looks up each example in this sequence, which is fast in a range.
            chosen[name] = [n for n in numbers if n not in left_out] if left_out else numbers
        return chosen


def _evaluated(
    model: Any,
    tasks: Sequence[Any],
    selection: Selection,
    chosen: Mapping[str, Sequence[int]],
) -> list[TaskResult]:
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=selection.manager,
        samples=dict(chosen),
        log_samples=True,
        random_seed=None,  # nothing is drawn, and a surrounding training keeps its seeds
        numpy_random_seed=None,
        torch_random_seed=None,
        bootstrap_iters=1000,
    )
    return [] if results is None else from_harness(results)


class ScorerModel(TemplateLM):
    """Wraps a scorer and a tokenizer as a model of the harness.

    Every rank runs the whole harness with the same requests; the scorer distributes them.

    Args:
        start: ids to prepend to each text, as in training and as the harness's `hf` model does; a
            text without context follows the last of them.
        shows_progress: whether this rank shows a progress bar.

    Raises:
        UsageError: the tokenizer does not encode text.
    """

    def __init__(
        self,
        scorer: MegatronScorer,
        tokenizer: Tokenizer,
        *,
        start: Sequence[int] = (),
        shows_progress: bool = False,
    ) -> None:
        super().__init__()
        if tokenizer.identity is None:
            raise UsageError(
                "the tokenizer encodes no text: tasks need a model that was trained with a "
                "text tokenizer"
            )
        self.scorer, self.encoder, self.end = scorer, tokenizer.build(), tokenizer.eod
        self.start = list(start)
        self.bar_disabled = None if shows_progress else True  # None: shown on a terminal only

    @property
    def longest(self) -> int:
        return self.scorer.longest

    @property
    def prefix_token_id(self) -> int:
        return self.start[-1] if self.start else self.eot_token_id

    @property
    def eot_token_id(self) -> int:
        if self.end is None:
            raise UsageError(
                "the tokenizer has no end-of-document token, required before text without "
                "context: use tasks whose examples have context, or another tokenizer"
            )
        return self.end

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, preceded by `start` as in the training data."""
        ids: list[int] = self.encoder.encode_batch([string])[0].tolist()
        return ids if add_special_tokens is False else [*self.start, *ids]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether the model would generate it."""
        return super().loglikelihood(requests, disable_tqdm=True)  # `_scores` shows its own bar

    def _loglikelihood_tokens(
        self, requests: list[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, option) for _, context, option in requests]
        answers = [(sum(s.logprobs), all(s.greedy)) for s in self._scores(rows)]
        for (key, _, _), pair in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, pair)
        return answers

    def _row(self, context: Sequence[int], option: Sequence[int]) -> Row:
        """Return the row of a request, without its beginning if it is too long."""
        tokens = (*context, *option)[-(self.scorer.longest + 1) :]
        return Row(tokens, min(len(option), len(tokens) - 1))

    def _scores(self, rows: Sequence[Row]) -> list[RowScore]:
        with tqdm(total=len(rows), disable=self.bar_disabled) as bar:
            return self.scorer.score(rows, progress=lambda done: bar.update(done - bar.n))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of whole texts, in windows that do not overlap; see `prefix_token_id`."""
        rows: list[Row] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.scorer.longest,
                context_len=1,
            )
            for context, option in map(utils.make_disjoint_window, windows):
                rows.append(self._row(context, option))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scores(rows), strict=True):
            totals[owner] += sum(score.logprobs)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Raise UsageError: a scorer generates no text."""
        raise UsageError(
            "tasks that generate text require an exported model: convert the checkpoint "
            "(tools/convert_checkpoint.py --to hf) and evaluate it with --hf"
        )
