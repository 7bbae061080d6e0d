"""Zero-shot tasks by lm-evaluation-harness, over a model of Megatron's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from megatron_smlp.data.tokenizers.spec import Tokenizer
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.megatron_model import MegatronScorer
from megatron_smlp.evaluation.reports import TaskResult, from_harness
from megatron_smlp.evaluation.rows import Row, RowScore
from megatron_smlp.evaluation.selection import Selection
from megatron_smlp.generation.language_model import LanguageModel
from megatron_smlp.serving.answers import Answer
from megatron_smlp.serving.sampling import Job, answer

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation), and the token ids of both."""
MAX_NEW_TOKENS = 256
"""Limit for tasks that set no max_gen_toks; the harness's `hf` model has the same default."""
TOP_K = 50
"""Of tasks that sample and set no top_k: transformers' own, as the harness's `hf` model has it."""
IDLE = {"num_beams": 1}
"""Values that ask for nothing, of settings that are not supported."""


def run_tasks(model: Any, selection: Selection, *, limit: int | None) -> list[TaskResult]:
    """Score every example of the tasks, zero-shot.

    Args:
        model: a `lm_eval.api.model.LM`.
        limit: examples per task, the first ones; None: all.

    Returns:
        a result per task; nothing on ranks that the harness gives none.
    """
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


def check_requests(requests: Sequence[Request], *, longest: int) -> None:
    """Check that every continuation fits into the model; contexts are cut to fit.

    Raises:
        UsageError: with the text, its tokens, and the model's length.
    """
    for (_, text), _, continuation in requests:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        if len(continuation) > longest:
            raise UsageError(
                f"the option {shown!r} has {len(continuation)} tokens and the model's sequences "
                f"end at {longest}: leave the example out, or evaluate a model with a longer "
                "--seq-length"
            )
        if not continuation:
            raise UsageError(
                f"the option {shown!r} has no tokens of its own: there is nothing to score"
            )


class ScorerModel(TemplateLM):
    """A scorer and a tokenizer as a model of the harness.

    Every rank runs the whole harness with the same requests; the scorer distributes them.

    Args:
        start: ids that stand before each text, as in the training and as the harness's `hf` model
            puts them there; the last is also what a text without context follows.
        shows_progress: whether this rank shows a progress bar.
        generator: makes the model that generates, when a task asks for text; None: none can.

    Raises:
        UsageError: the tokenizer's ids stand for no text.
    """

    def __init__(
        self,
        scorer: MegatronScorer,
        tokenizer: Tokenizer,
        *,
        start: Sequence[int] = (),
        shows_progress: bool = False,
        generator: Callable[[], LanguageModel] | None = None,
    ) -> None:
        super().__init__()
        if tokenizer.identity is None:
            raise UsageError(
                "the tokenizer has numbers and no texts: tasks need a model that was trained with "
                "a tokenizer of text"
            )
        self.scorer, self.encoder, self.end = scorer, tokenizer.build(), tokenizer.eod
        self.start = list(start)
        self.bar_disabled = None if shows_progress else True  # None: shown on a terminal only
        self.generator = generator

    @property
    def prefix_token_id(self) -> int:
        return self.start[-1] if self.start else self.eot_token_id

    @property
    def eot_token_id(self) -> int:
        if self.end is None:
            raise UsageError(
                "the tokenizer has no end-of-document token, which stands before a text without "
                "context: evaluate tasks whose examples have one, or another tokenizer"
            )
        return self.end

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text as in the training data: behind `start`."""
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
        check_requests(requests, longest=self.scorer.longest)
        rows = [self._row(context, option) for _, context, option in requests]
        answers = [(sum(s.logprobs), all(s.greedy)) for s in self._scores(rows)]
        for (key, _, _), pair in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, pair)
        return answers

    def _row(self, context: Sequence[int], option: Sequence[int]) -> Row:
        """Return the row of a request; a context that is too long loses its beginning."""
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
        """Generate one text after the other; every rank makes all of them, and the same ones.

        Each request draws by a seed of its own: a task that repeats one wants other samples.
        """
        if self.generator is None:
            raise UsageError(
                "tasks that generate text are not scored during training: run "
                "tools/evaluate.py --checkpoint DIR --tasks ... on a saved checkpoint"
            )
        asked = [(request.args[0], *settings_of(request.args[1])) for request in requests]
        lm = self.generator()
        bar = tqdm(asked, disable=self.bar_disabled)
        return [generate_until(lm, *one, seed=seed) for seed, one in enumerate(bar)]


def settings_of(asked: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return stop texts, and fields of a `Job`, as the harness's `hf` model reads them.

    Args:
        asked: a task's `generation_kwargs`: until, max_gen_toks or another name for it, do_sample,
            temperature, top_p, top_k, repetition_penalty.

    Raises:
        UsageError: one of them is another, or its value is not possible.
    """
    try:
        given = {name: value for name, value in asked.items() if value is not None}
        given = {**normalize_gen_kwargs(given, MAX_NEW_TOKENS)}
        count, until, samples = (given.pop(name) for name in ("max_gen_toks", "until", "do_sample"))
        temperature = float(given.pop("temperature", 0.0))
        drawn = {
            "top_p": float(given.pop("top_p", 1.0)),
            "top_k": int(given.pop("top_k", TOP_K)),
            "repetition_penalty": float(given.pop("repetition_penalty", 1.0)),
        }
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the task's generation_kwargs {dict(asked)} cannot be read: {error}"
        ) from error
    if samples and not temperature > 0:
        raise UsageError(
            f"the task asks for do_sample: {samples} and temperature: {temperature}: give its "
            "generation_kwargs a temperature over 0, or do_sample: false"
        )
    for name, value in given.items():
        if name not in IDLE or value != IDLE[name]:
            raise UsageError(
                f"the task asks for {name}: {value} in its generation_kwargs, which --checkpoint "
                "lacks: leave it out, or convert the checkpoint and evaluate that with --hf"
            )
    temperature = temperature if samples else 0.0
    return list(filter(None, until)), {"max_tokens": count, "temperature": temperature, **drawn}


def generate_until(
    lm: LanguageModel, context: str, until: list[str], settings: Mapping[str, Any], *, seed: int
) -> str:
    """Return the continuation of a context, which loses its beginning where room is short.

    Args:
        settings: fields of the `Job`.

    Raises:
        UsageError: more new tokens than the model has positions.
    """
    count = settings["max_tokens"]
    if not 0 < count < lm.longest:
        raise UsageError(
            f"the task asks for {count} new tokens (max_gen_toks) and the model's sequences end at "
            f"{lm.longest}: evaluate a model with a longer --seq-length"
        )
    prompt = (lm.encode(context) or [lm.end or 0])[-(lm.longest - count) :]
    text = Answer(lm, prompt, until)
    job = Job(prompt=prompt, seed=seed, on_token=lambda _, token: text.push(token), **settings)
    answer(lm, job)
    return text.text
