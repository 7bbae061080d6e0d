"""The loss of partial prediction: training counts the suffix, validation reports both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support.in_process import layer_config, pretrained
from support.launches import steps
from torch import Tensor, nn

from megatron_smlp.errors import UsageError
from megatron_smlp.routers.balance_loss import scale_balance_losses
from megatron_smlp.training.forward import SUFFIX_LOSS, WHOLE_LOSS, ForwardStep

PARTIAL = """
    --architecture smlp --num-dense-layers 2 --feature-router partial --num-feature-experts 4
    --prefix-fraction 0.25
"""
TOKENS, PREFIX = 16, 4


def losses_and_mask() -> tuple[Tensor, Tensor]:
    """<float>[2, 16] each; two targets are masked, one before P and one after it."""
    mask = torch.ones(2, TOKENS)
    mask[0, 1] = mask[1, 9] = 0
    return torch.randn(2, TOKENS).exp().requires_grad_(), mask


def mean(losses: Tensor, mask: Tensor, *, start: int) -> Tensor:
    kept = mask[:, start:] > 0
    return losses[:, start:][kept].mean()


def loss_of(report: Tensor) -> Tensor:
    return report[0] / report[1]


def test_what_an_end_of_a_document_changes_is_another_training(tmp_path: Path):
    flags = "--architecture transformer --num-attention-heads 4 --vocab-size 20"
    flags += " --train-iters 1 --eval-iters 0"
    losses = []
    for more in ("", "--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"):
        folder = tmp_path / (more or "plain")
        with pretrained(f"{flags} --null-tokenizer-eod-id 3 {more} --log-dir {folder}"):
            losses.append(steps(folder)[0].loss)
    assert len(set(losses)) == 4


@pytest.mark.parametrize(
    ("flags", "start"),
    [(PARTIAL, PREFIX), (f"{PARTIAL} --partial-loss all", 0), ("--architecture gmlp", 0)],
)
def test_training_counts_the_targets_that_are_predicted(
    parse: Callable[..., Any], flags: str, start: int
):
    parse(flags)
    losses, mask = losses_and_mask()
    total, count, reports = ForwardStep()._loss(mask, losses)
    torch.testing.assert_close(total / count, mean(losses, mask, start=start))
    torch.testing.assert_close(loss_of(reports["lm loss"]), mean(losses, mask, start=start))
    # The trained and the compared loss have separate names, whichever of them is "lm loss".
    parts = {"lm loss": start} | ({SUFFIX_LOSS: PREFIX} if "partial" in flags else {})
    parts |= {WHOLE_LOSS: 0} if start else {}
    assert {name: loss_of(report).item() for name, report in reports.items()} == {
        name: pytest.approx(mean(losses, mask, start=first).item()) for name, first in parts.items()
    }
    total.backward()
    assert losses.grad is not None
    assert torch.equal(losses.grad[:, :start], torch.zeros(2, start))
    assert torch.equal(losses.grad[:, start:], mask[:, start:])


@pytest.mark.parametrize("flags", [PARTIAL, f"{PARTIAL} --partial-loss all"])
def test_validation_reports_the_whole_and_the_suffix(parse: Callable[..., Any], flags: str):
    parse(flags)
    losses, mask = losses_and_mask()
    total, count, reports = ForwardStep()._loss(mask, losses.detach())
    torch.testing.assert_close(total / count, mean(losses, mask, start=0))
    torch.testing.assert_close(loss_of(reports["lm loss"]), mean(losses, mask, start=0))
    torch.testing.assert_close(loss_of(reports[SUFFIX_LOSS]), mean(losses, mask, start=PREFIX))


@pytest.mark.parametrize(("position", "trains"), [("7", True), ("0.45", False)])
def test_a_system_reports_a_suffix_where_asked(
    parse: Callable[..., Any], trains: bool, position: str
):
    """0.45 of 16 tokens is 7."""
    losses, mask = losses_and_mask()
    given = losses if trains else losses.detach()
    parse("--architecture gmlp")
    assert set(ForwardStep()._loss(mask, given)[2]) == {"lm loss"}
    parse(f"--architecture gmlp --suffix-from {position}")
    reports = ForwardStep()._loss(mask, given)[2]
    assert set(reports) == {"lm loss", SUFFIX_LOSS}
    torch.testing.assert_close(loss_of(reports["lm loss"]), mean(losses, mask, start=0))
    torch.testing.assert_close(loss_of(reports[SUFFIX_LOSS]), mean(losses, mask, start=7))


@pytest.mark.parametrize("position", ["0", TOKENS, "2.5", "0.05", "nan"])
def test_a_suffix_that_is_none_is_refused(parse: Callable[..., Any], position: str):
    with pytest.raises(UsageError, match=f"--suffix-from {position}: give a whole position over"):
        parse(f"--architecture gmlp --suffix-from={position}")


@pytest.mark.parametrize(
    ("per_token", "grad_scale", "expected"),
    [(False, None, 1 / 3), (True, None, 1.0), (False, 8.0, 8 / 3), (True, 8.0, 8.0)],
)
def test_balance_losses_weigh_as_the_main_loss(
    parse: Callable[..., Any], per_token: bool, grad_scale: float | None, expected: float
):
    """Once for all three micro-batches, or once for each if the loss is per token."""
    parse(f"{PARTIAL} --global-batch-size 6 --micro-batch-size 2")
    scale = None if grad_scale is None else lambda loss: loss * grad_scale
    model = nn.Module()
    model.config = layer_config(calculate_per_token_loss=per_token, grad_scale_func=scale)
    scale_balance_losses(model)
    share = torch.ones(1, requires_grad=True)
    MoEAuxLossAutoScaler.apply(torch.ones(1, requires_grad=True), share).sum().backward()
    torch.testing.assert_close(share.grad, torch.tensor([expected]))
