"""Score rows of tokens with an exported model, or any other causal transformers model.

    log p(y) = log_softmax(l)_y,    l: the logits after all tokens before y

Only rows of equal length share a batch, so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_smlp.evaluation.rows import Progress, Row, RowScore


class ExportedScorer:
    """A transformers model that scores rows, in this process.

    Args:
        model: from `AutoModelForCausalLM`, in evaluation mode.
        longest: T.
        batch_size: rows per batch; always one on a CPU, where the rounding of a matrix product
            depends on its number of rows.
    """

    def __init__(self, model: Any, *, longest: int, batch_size: int) -> None:
        self.model = model
        self.longest = longest
        self.batch_size = 1 if model.device.type == "cpu" else batch_size

    def score(self, rows: Sequence[Row], *, progress: Progress | None = None) -> list[RowScore]:
        """Return the score of each row, in order."""
        scores: dict[int, RowScore] = {}
        waiting = sorted(range(len(rows)), key=lambda number: len(rows[number].tokens))
        while waiting:
            length = len(rows[waiting[-1]].tokens)
            batch = [n for n in waiting[-self.batch_size :] if len(rows[n].tokens) == length]
            scores |= zip(batch, self._batch([rows[n] for n in batch]), strict=True)
            del waiting[-len(batch) :]
            if progress is not None:
                progress(len(scores))
        return [scores[number] for number in range(len(rows))]

    @torch.inference_mode()
    def _batch(self, rows: Sequence[Row]) -> list[RowScore]:
        """Score rows of equal length; the input is all of their tokens but the last."""
        tokens = torch.tensor([row.tokens for row in rows], device=self.model.device)
        logits = self.model(tokens[:, :-1], use_cache=False).logits
        scores = []
        for row, targets, each in zip(rows, tokens[:, 1:, None], logits, strict=True):
            values = each.float()  # of one row: those of a batch may exceed a GPU's memory
            logprobs = values.log_softmax(dim=-1).gather(1, targets)[-row.scored :, 0]
            greedy = values.gather(1, targets)[:, 0] == values.amax(dim=-1)
            scores.append(RowScore(tuple(logprobs.tolist()), tuple(greedy[-row.scored :].tolist())))
        return scores
