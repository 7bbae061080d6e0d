"""A model's call hands its routers values that reach each pass and its recomputation."""

from typing import Any

import torch
from torch import Tensor

from megatron_smlp.routers.handed import Handed, repeats_a_pass


class Recomputed(torch.autograd.Function):
    """A checkpoint function that does not announce itself, like Transformer Engine's under FP8."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.run(x)
        torch.autograd.backward(output, gradients)
        return None, x.grad


class Layer:
    """Multiplies by what it is handed, and records what it saw."""

    def __init__(self) -> None:
        self.handed, self.seen = Handed(), []

    def __call__(self, x: Tensor) -> Tensor:
        value = self.handed.take()
        self.seen.append((value.item(), repeats_a_pass()))
        return x * value


def test_a_recomputed_pass_finds_its_own_micro_batch():
    """Two micro-batches are in flight, as on a pipeline stage; backward follows forward's order."""
    layer, x = Layer(), torch.ones(1, requires_grad=True)
    outputs = []
    for value in (2.0, 3.0):
        layer.handed.hand(torch.tensor(value))
        outputs.append(Recomputed.apply(layer, x))
    gradients = [torch.autograd.grad(output, x)[0].item() for output in outputs]
    assert gradients == [2.0, 3.0]
    assert layer.seen == [(2.0, False), (3.0, False), (2.0, True), (3.0, True)]


def test_an_evaluation_for_which_nothing_is_handed_leaves_nothing_behind():
    """GShard's keys exist in training only; the layer is called all the same."""
    layer, x = Layer(), torch.ones(1, requires_grad=True)
    gradients = []
    for value in (2.0, 3.0, 4.0):
        layer.handed.hand(torch.tensor(value))
        gradients.append(torch.autograd.grad(Recomputed.apply(layer, x), x)[0].item())
        with torch.no_grad():
            layer(x)
            layer(x)
    assert gradients == [2.0, 3.0, 4.0]
