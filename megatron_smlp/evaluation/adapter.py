"""A Scorer and a tokenizer as a model of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from megatron_smlp.data.tokenizers.spec import Tokenizer
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.generating import generate_until
from megatron_smlp.evaluation.requests import Request, check_requests
from megatron_smlp.evaluation.scoring import Row, Scorer
from megatron_smlp.generation.language_model import LanguageModel


class ScorerModel(TemplateLM):
    """Every rank runs the whole harness with the same requests; the scorer deals them out.

    Args:
        speaks: whether this rank shows a progress bar.
        generator: makes the model that generates, when a task asks for text; None: none can.

    Raises:
        UsageError: the tokenizer's ids stand for no text.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        *,
        speaks: bool,
        generator: Callable[[], LanguageModel] | None = None,
    ) -> None:
        super().__init__()
        if tokenizer.identity is None:
            raise UsageError(
                "the tokenizer has numbers and no texts: tasks need a model that was trained with "
                "a tokenizer of text"
            )
        self.scorer = scorer
        self.encoder = tokenizer.build()
        self.end = tokenizer.eod
        self.speaks = speaks
        self.generator = generator

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
        """Text to ids, as the training data was written: nothing is put around it."""
        ids, _ = self.encoder.encode_batch([string])
        return [int(number) for number in ids]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether it is what the model would say."""
        return super().loglikelihood(requests, disable_tqdm=True)  # a bar of its own is below

    def _loglikelihood_tokens(
        self, requests: list[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        check_requests(requests, longest=self.scorer.longest)
        rows = [self._row(context, option) for _, context, option in requests]
        answers = [(sum(s.logprobs), all(s.greedy)) for s in self._scores(rows)]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _row(self, context: Sequence[int], option: Sequence[int]) -> Row:
        """A context that is too long loses its beginning, as everywhere in the harness."""
        tokens = (*context, *option)[-(self.scorer.longest + 1) :]
        return Row(tokens, min(len(option), len(tokens) - 1))

    def _scores(self, rows: Sequence[Row]) -> Any:
        with tqdm(total=len(rows), disable=None if self.speaks else True) as bar:
            return self.scorer.score(rows, progress=lambda done: bar.update(done - bar.n))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows that do not overlap, after an end-of-document token."""
        rows: list[Row] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
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
        """One after the other; every rank makes all texts, which are the same everywhere."""
        if self.generator is None:
            raise UsageError(
                "tasks that generate text are not scored during training: run "
                "tools/evaluate.py --checkpoint DIR --tasks ... on a saved checkpoint"
            )
        lm = self.generator()
        bar = tqdm(requests, disable=None if self.speaks else True)
        return [generate_until(lm, *request.args) for request in bar]
