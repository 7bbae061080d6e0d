"""Run lm-evaluation-harness's zero-shot tasks on a Megatron model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from megatron_smlp.data.tokenizers.spec import Tokenizer
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.megatron_scorer import MegatronScorer
from megatron_smlp.evaluation.reports import TaskResult, from_harness
from megatron_smlp.evaluation.rows import Row, RowScore
from megatron_smlp.evaluation.selection import Selection

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation), then the token ids of each."""


def run_tasks(model: Any, selection: Selection, *, limit: int | None) -> Iterator[TaskResult]:
    """Score the examples of the tasks zero-shot, one task or group after another.

    Args:
        model: a `lm_eval.api.model.LM`.
        limit: number of examples per task, from the first; None: all.

    Yields:
        a result per task, as each ends; nothing on ranks where the harness returns none.

    Raises:
        UsageError: as check_tasks.
    """
    check_tasks(model, selection)
    for item in selection.tasks:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[item],
            task_manager=selection.manager,
            num_fewshot=0,
            limit=limit,
            log_samples=True,
            # Python's own seed is the harness's default: tasks may shuffle, on all ranks alike.
            numpy_random_seed=None,
            torch_random_seed=None,
            bootstrap_iters=1000,
        )
        if results is not None:
            yield from from_harness(results)


def check_tasks(model: Any, selection: Selection) -> None:
    """Check all tasks up front, before hours of scoring or training.

    Raises:
        UsageError: a task needs a model that generates text, or one that is longer.
    """
    for name, task in selection.manager.load(selection.tasks)["tasks"].items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        if isinstance(model, ScorerModel):
            model.generate_until([])
        asked = dict(task.config.generation_kwargs or {})
        count = normalize_gen_kwargs(asked, model.max_gen_toks)["max_gen_toks"]
        if count >= model.max_length:
            raise UsageError(
                f"--tasks {name} asks for {count} new tokens (max_gen_toks), but the model has "
                f"{model.max_length} positions: leave it out, or evaluate a longer model"
            )


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
        answers = [
            # An option without tokens of its own is never the likeliest.
            (sum(score.logprobs), all(score.greedy)) if score.logprobs else (-math.inf, False)
            for score in self._scores(rows)
        ]
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
