"""Score rows of tokens with Megatron's own model, in any layout of tensor, pipeline, expert and
data parallelism.

A score depends on its row alone: not on other rows, their order, or how many go through the model
at once. The rows are distributed over the data parallel ranks, pass through the stages by
Megatron's schedule, and are scored on the last one, where the logits stay sharded over the
vocabulary:

    log p(y) = l_y - m - log sum_v exp(l_v - m),    m = max_v l_v        both sums over the TP group

Rows are padded on the right, so positions count from 0. On a CPU every row goes through the model
alone, without padding: the rounding of a matrix product there depends on its number of rows, and a
score would depend on its batch. GPUs take batches. If experts are spread over data ranks, all of
these pad the rows of one forward pass to the same length.

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
from megatron.training import get_args
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_smlp.collectives import gathered
from megatron_smlp.evaluation.rows import Progress, Row, RowScore
from megatron_smlp.training.forward import other_documents


class MegatronScorer:
    """A Megatron model that scores rows. Collective: all ranks pass the same rows.

    Args:
        stages: the model chunks of this rank, as in Megatron's training.
        longest: T.
        batch_size: rows per batch on a data parallel rank; always one on a CPU.
        end: id that ends documents, which are then kept as far apart as in the model's training;
            None: a row is one text.
    """

    def __init__(
        self, stages: Sequence[Any], *, longest: int, batch_size: int, end: int | None = None
    ) -> None:
        self.stages = list(stages)
        self.longest, self.end = longest, end
        self.config = get_model_config(self.stages[0])
        self.device = torch.device(torch.cuda.current_device())
        self.batch_size = 1 if self.device.type == "cpu" else batch_size

    def score(self, rows: Sequence[Row], *, progress: Progress | None = None) -> list[RowScore]:
        """Return the score of each row, on every rank."""
        if not rows:
            return []
        # Sorted by length, rows need little padding; the longest first, to run out of memory early.
        order = sorted(range(len(rows)), key=lambda number: (-len(rows[number].tokens), number))
        size, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        # All data ranks make the same number of calls, as they may hold each other's experts.
        share = self.batch_size * -(-len(rows) // (size * self.batch_size))
        padded = [order[place % len(order)] for place in range(share * size)]
        scores: dict[int, RowScore] = {}
        splits = self.config.expert_tensor_parallel_size > self.config.tensor_model_parallel_size
        shares_experts = self.config.expert_model_parallel_size > 1 or splits
        with self._evaluating():
            for start in range(0, share, self.batch_size):
                everyone = padded[start * size : (start + self.batch_size) * size]
                batch = everyone[rank::size]
                # Ranks that share experts gather each other's tokens, equally many from each.
                beside = everyone if shares_experts else batch
                length = self._length([rows[number] for number in beside])
                answers = self._forward([rows[number] for number in batch], length)
                scores |= zip(batch, answers, strict=bool(answers))
                if progress is not None:
                    progress(min(len(rows), (start + self.batch_size) * size))
        # Of the ranks that hold one replica of the model, a single one sends scores to all ranks.
        sends = mpu.is_pipeline_last_stage(ignore_virtual=True) and (
            mpu.get_tensor_model_parallel_rank() == 0
        )
        everybodys: dict[int, RowScore] = {}
        for part in gathered(scores if sends else {}):
            everybodys |= part
        return [everybodys[number] for number in range(len(rows))]

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Turn off gradients, dropout and Megatron's timers, and restore everything on exit."""
        training = [stage.training for stage in self.stages]
        config = self.config
        timers, config.timers = config.timers, None
        sync, config.param_sync_func = config.param_sync_func, None  # each module's hooks wait
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
        # The interleaved schedule needs as many micro-batches as there are stages.
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
        """Return the longest input's length, rounded up if sequence parallelism must split it."""
        length = max(len(row.tokens) for row in rows) - 1
        if self.config.sequence_parallel:
            size = mpu.get_tensor_model_parallel_world_size()
            length = min(self.longest, -(-length // size) * size)
        return length

    def _step(self, tokens: Tensor, rows: Sequence[Row], _: Any, stage: Any) -> tuple[Any, Any]:
        """Megatron's `forward_step_func`."""
        args, mask = get_args(), None
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if self.end is not None and args.reset_attention_mask:
            mask = other_documents(tokens, self.end)
        if self.end is not None and args.reset_position_ids:
            begins = (tokens == self.end).roll(1, 1) * positions
            positions = positions - begins.cummax(1).values
        return stage(tokens, positions, mask), partial(self._scored, rows)

    def _scored(
        self, rows: Sequence[Row], logits: Tensor, *, non_loss_data: bool
    ) -> list[RowScore]:
        """Score the last tokens of each row; logits: <float>[B, T, V / TP]."""
        parts = [
            scores[len(row.tokens) - 1 - row.scored : len(row.tokens) - 1]
            for scores, row in zip(logits, rows, strict=True)
        ]
        targets = [token for row in rows for token in row.tokens[len(row.tokens) - row.scored :]]
        logprobs, greedy = score_targets(
            torch.cat(parts), torch.tensor(targets, device=logits.device)
        )
        counts = [row.scored for row in rows]
        pairs = zip(logprobs.cpu().split(counts), greedy.cpu().split(counts), strict=True)
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
