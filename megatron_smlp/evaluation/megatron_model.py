"""Score rows of tokens with Megatron's own model, in any layout of tensor, pipeline, expert and
data parallelism.

A score belongs to its row alone: it does not depend on the rows beside it, on their order, or on
how many go through the model at once. The rows are distributed over the data parallel ranks, go
through the stages by Megatron's schedule, and are scored on the last one where the logits are,
still cut over the vocabulary:

    log p(y) = l_y - m - log sum_v exp(l_v - m),    m = max_v l_v        both sums over the TP group

Rows are padded on the right, so positions count from 0. On a CPU every row goes through the model
by itself, without padding: a matrix product there rounds by the number of its rows, and a score
would depend on its batch. GPUs take batches. Where experts are spread over data ranks, the rows
that go through at one time are padded to one length everywhere.

Letters: B rows at once, T tokens, V vocabulary, n scored tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_smlp.collectives import gathered
from megatron_smlp.evaluation.rows import Progress, Row, RowScore


class MegatronScorer:
    """A model of Megatron's that scores rows; collective: all ranks score the same rows.

    Args:
        stages: the model chunks of this rank, as Megatron's training has them.
        longest: T.
        batch_size: rows at once on a data parallel rank; on a CPU it is one, whatever is given.
    """

    def __init__(self, stages: Sequence[Any], *, longest: int, batch_size: int) -> None:
        self.stages = list(stages)
        self.longest = longest
        self.config = get_model_config(self.stages[0])
        self.device = torch.device(torch.cuda.current_device())
        self.batch_size = 1 if self.device.type == "cpu" else batch_size

    def score(self, rows: Sequence[Row], *, progress: Progress | None = None) -> list[RowScore]:
        """Return the score of each row, on every rank."""
        if not rows:
            return []
        # Neighbours of one length need little padding; the longest come first, where memory ends.
        order = sorted(range(len(rows)), key=lambda number: (-len(rows[number].tokens), number))
        size, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        # All data ranks make the same number of calls: their experts may live on each other.
        share = self.batch_size * -(-len(rows) // (size * self.batch_size))
        padded = [order[place % len(order)] for place in range(share * size)]
        scores: dict[int, RowScore] = {}
        with self._evaluating():
            for start in range(0, share, self.batch_size):
                everyone = padded[start * size : (start + self.batch_size) * size]
                batch = everyone[rank::size]
                # Ranks that share experts gather each other's tokens, as many from each.
                beside = everyone if self.config.expert_model_parallel_size > 1 else batch
                length = self._length([rows[number] for number in beside])
                answers = self._forward([rows[number] for number in batch], length)
                scores |= zip(batch, answers, strict=bool(answers))
                if progress is not None:
                    progress(min(len(rows), (start + self.batch_size) * size))
        # Of the ranks that hold one model, a single one sends its scores to everybody.
        sends = mpu.is_pipeline_last_stage(ignore_virtual=True) and (
            mpu.get_tensor_model_parallel_rank() == 0
        )
        everybodys: dict[int, RowScore] = {}
        for part in gathered(scores if sends else {}):
            everybodys |= part
        return [everybodys[number] for number in range(len(rows))]

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Turn gradients, dropout and Megatron's timers off, and leave everything as it was."""
        training = [stage.training for stage in self.stages]
        config = self.config
        timers, config.timers = config.timers, None
        sync, config.param_sync_func = config.param_sync_func, None  # the hooks of each module wait
        for stage in self.stages:
            stage.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            config.timers, config.param_sync_func = timers, sync
            for stage, mode in zip(self.stages, training, strict=True):
                stage.train(mode)

    def _forward(self, rows: Sequence[Row], length: int) -> list[RowScore]:
        """Run one batch, padded to `length`; return its scores on the last stage, else nothing."""
        # The input of each row is all of its tokens but the last: <int64>[B, T].
        inputs = [[*row.tokens[:-1], *[0] * (length + 1 - len(row.tokens))] for row in rows]
        tokens = torch.tensor(inputs, device=self.device)
        # The interleaved schedule wants as many micro-batches as there are stages.
        interleaved = len(self.stages) > 1
        repeats = mpu.get_pipeline_model_parallel_world_size() if interleaved else 1
        outputs = get_forward_backward_func()(
            forward_step_func=partial(self._step, tokens, rows),
            data_iterator=[None] * len(self.stages) if interleaved else None,
            model=self.stages if interleaved else self.stages[0],
            num_microbatches=repeats,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            decoder_seq_length=tokens.shape[1],
            forward_only=True,
            collect_non_loss_data=True,
        )
        return outputs[0] if outputs else []

    def _length(self, rows: Sequence[Row]) -> int:
        """Return the length of the longest input; sequence parallelism cuts it evenly."""
        length = max(len(row.tokens) for row in rows) - 1
        if self.config.sequence_parallel:
            size = mpu.get_tensor_model_parallel_world_size()
            length = min(self.longest, -(-length // size) * size)
        return length

    def _step(self, tokens: Tensor, rows: Sequence[Row], _: Any, stage: Any) -> tuple[Any, Any]:
        """Megatron's `forward_step_func`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return stage(tokens, positions, None), partial(self._scored, rows)

    def _scored(
        self, rows: Sequence[Row], logits: Tensor, *, non_loss_data: bool
    ) -> list[RowScore]:
        """Score the last tokens of each row; logits: <float>[B, T, V / TP]."""
        parts = [
            scores[len(row.tokens) - 1 - row.scored : len(row.tokens) - 1]
            for scores, row in zip(logits, rows, strict=True)
        ]
        targets = [token for row in rows for token in row.tokens[-row.scored :]]
        logprobs, greedy = score_targets(
            torch.cat(parts), torch.tensor(targets, device=logits.device)
        )
        counts = [row.scored for row in rows]
        pairs = zip(logprobs.split(counts), greedy.split(counts), strict=True)
        return [RowScore(tuple(values.tolist()), tuple(flags.tolist())) for values, flags in pairs]


def score_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p of the targets, and whether each is the likeliest token.

    Args:
        logits: <float>[n, V / TP], this rank's part of the vocabulary.
        targets: <int64>[n], ids of the whole vocabulary.

    Returns:
        <fp32>[n] and <bool>[n], the same on every rank of the TP group.
    """
    logits = logits.float()
    group = mpu.get_tensor_model_parallel_group()
    first = mpu.get_tensor_model_parallel_rank() * logits.shape[1]
    local = targets - first
    is_here = (local >= 0) & (local < logits.shape[1])
    picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    picked = torch.where(is_here, picked, torch.zeros_like(picked))
    largest = logits.amax(dim=1)
    torch.distributed.all_reduce(picked, group=group)
    torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=group)
    total = (logits - largest[:, None]).exp().sum(dim=1)
    torch.distributed.all_reduce(total, group=group)
    return picked - largest - total.log(), picked == largest
