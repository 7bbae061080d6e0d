"""The forward pass of a micro-batch: its tokens, the model, the loss.

    loss = sum over tokens of mask * -log p(label) / number of tokens        of one micro-batch

Megatron averages over micro-batches, or, with --calculate-per-token-loss, over all their tokens.
partial_prediction.py defines which positions count with partial prediction, and which losses are
reported in addition.

Letters: B micro-batch, T sequence length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, get_tokenizer
from torch import Tensor

from megatron_smlp.partial_prediction import suffix_start, trained_from
from megatron_smlp.routers.balance_loss import scale_balance_losses
from megatron_smlp.routers.draws import sample_keys
from megatron_smlp.routers.gshard import attach_samples
from megatron_smlp.routers.statistics import RouterStatistics
from megatron_smlp.systems import BY_PREFIX, token_router_class
from megatron_smlp.training.data import needs_batch, needs_every_batch
from megatron_smlp.training.slow_hosts import OwnPart

SUFFIX_LOSS = "suffix loss"
WHOLE_LOSS = "whole loss"
"""Name of the loss over all targets, reported when "lm loss" (trained on) covers only some."""
BATCH_KEYS = ("tokens", "position_ids", "labels", "loss_mask")

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


class ForwardStep:
    """Megatron's `forward_step_func`.

    Records, until popped, whether a loss was not finite and the seconds spent on getting batches.
    Holds the routers' statistics.
    """

    def __init__(self) -> None:
        self.statistics = RouterStatistics()
        self.nonfinite: Tensor | None = None
        self.data_seconds = 0.0
        self.own_part = OwnPart()
        self.place = _PlaceInRun()

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: Any
    ) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch through this stage of the model.

        Returns:
            on the last stage the loss of each token, <float>[B, T], else the stage's output; and
            the loss function that Megatron calls on it.
        """
        args, timers = get_args(), get_timers()
        with self.own_part.timed(getattr(args, "curr_iteration", 0)):
            timers("batch-generator", log_level=2).start()
            start = time.perf_counter()
            vp_stage = get_attr_wrapped_model(model, "vp_stage")
            batch = next_batch(data_iterator, vp_stage)
            if torch.is_grad_enabled():  # validation is not timed, and its routers draw nothing
                self.data_seconds += time.perf_counter() - start
                self._attach_keys(model, vp_stage)
            timers("batch-generator").stop()
            if args.feature_router in BY_PREFIX:
                scale_balance_losses(model)
            mask = None
            if args.reset_attention_mask:
                mask = other_documents(batch["tokens"], get_tokenizer().eod)
            output = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])
        return output, partial(self._loss, batch["loss_mask"])

    def _attach_keys(self, model: Any, vp_stage: int | None) -> None:
        """Give routers that draw random numbers the keys of this micro-batch's samples."""
        args = get_args()
        if args.token_router == "none" or not token_router_class(args.token_router).draws:
            return
        keys = sample_keys(
            seed=args.seed,
            first=self.place.first_sample(args, vp_stage),
            count=args.micro_batch_size,
            device=torch.device(torch.cuda.current_device()),
        )
        attach_samples(model, keys)

    def _loss(
        self, loss_mask: Tensor, token_losses: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum the loss. token_losses, loss_mask: <float>[B, T] -> sum, number of tokens, report."""
        args = get_args()
        trains = token_losses.requires_grad
        start = trained_from(args) if trains else 0
        loss, num_tokens = _masked_sum(token_losses, loss_mask, start=start)
        if trains:
            # Stays on the device: reading it here would make the host wait at each micro-batch.
            bad = ~torch.isfinite(loss.detach())
            self.nonfinite = bad if self.nonfinite is None else self.nonfinite | bad
        reports = {"lm loss": _report(loss, num_tokens)}
        if suffix_from := suffix_start(args):
            suffix = _masked_sum(token_losses, loss_mask, start=suffix_from)
            reports[SUFFIX_LOSS] = _report(*suffix)
        if start:
            reports[WHOLE_LOSS] = _report(*_masked_sum(token_losses, loss_mask))
        return loss, num_tokens, reports

    def pop_nonfinite(self) -> Tensor | None:
        """Return whether a loss since the last call was not finite, <bool>[]; None: no loss."""
        nonfinite, self.nonfinite = self.nonfinite, None
        return nonfinite

    def pop_data_seconds(self) -> float:
        """Return this rank's seconds spent on getting training batches since the last call."""
        seconds, self.data_seconds = self.data_seconds, 0.0
        return seconds


class _PlaceInRun:
    """Numbers the samples of the current micro-batch within the run, as the sampler does."""

    def __init__(self) -> None:
        self._started: dict[int | None, tuple[int, int]] = {}
        """Per stage on this rank: samples before this step, and micro-batches of it so far."""

    def first_sample(self, args: Any, vp_stage: int | None) -> int:
        """Return the number of its first sample; call once per forward pass of a stage."""
        before: int = args.consumed_train_samples
        step, number = self._started.get(vp_stage, (before, 0))
        number = number if step == before else 0
        self._started[vp_stage] = (before, number + 1)
        ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        return before + (number * ranks + rank) * int(args.micro_batch_size)


def other_documents(tokens: Tensor, eod: int) -> Tensor:
    """<int64>[B, T] -> <bool>[B, 1, T, T]: True (Megatron's convention) where position t may not
    read position s, because s is later or in another document."""
    ends = (tokens == eod).long()
    document = ends.cumsum(1) - ends
    return ~(document[:, :, None] == document[:, None, :]).tril()[:, None]


def _masked_sum(losses: Tensor, mask: Tensor, *, start: int = 0) -> tuple[Tensor, Tensor]:
    """<float>[B, T] -> the masked sum in fp32 from position `start` on, and its token count."""
    kept = mask[:, start:]
    return torch.sum(losses[:, start:].float() * kept), kept.sum().int()


def _report(loss: Tensor, num_tokens: Tensor) -> Tensor:
    """Return sum and count, <fp32>[2], which Megatron averages over micro-batches and ranks."""
    return torch.stack([loss.detach(), num_tokens.to(loss.dtype)])


def next_batch(
    data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None
) -> dict[str, Tensor | None]:
    """Return the next micro-batch, broadcast over the TP group; entries that this stage does not
    need are None.

    Returns:
        tokens, position_ids, labels: <int64>[B, T]; loss_mask: <float32>[B, T].
    """
    args = get_args()
    if not needs_batch(args, vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) for key in BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=(
            args.micro_batch_size if torch.is_grad_enabled() else args.eval_micro_batch_size
        ),
        seq_length=args.seq_length,
        # If true, Megatron broadcasts the whole batch on every stage.
        mtp_on_this_rank=needs_every_batch(args),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return {key: batch.get(key) for key in BATCH_KEYS}
