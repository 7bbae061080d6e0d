"""The causal gate and its gradients, on operands drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5


@dataclass(frozen=True)
class Gate:
    """The sizes and dtypes of one call."""

    tokens: int
    batch: int
    heads: int
    width: int
    dtype: torch.dtype
    weight_dtype: torch.dtype = torch.float32
    has_added: bool = False
    garbage: bool = False
    """Whether M is NaN above the diagonal."""
    normed: bool = False
    """Whether to call `gelu_gate`, which computes v itself."""
    experts: int = 0
    """Number of matrices of a routed gate; 0: one per head."""
    prefix: int = 0

    def operands(self, device: str = "cpu") -> list[Tensor]:
        """Draw u1, v, M, b, and the addend or the scales, on the CPU; u1 and v are halves of one
        tensor, as in a layer, and b and the scales are transposed. For `gelu_gate`, draw u, w and
        b of LN, M, b, and the addend.
        """
        torch.manual_seed(self.tokens)
        features, matrices = self.heads * self.width, self.experts or self.heads
        both = torch.randn(self.tokens, self.batch, 2 * features).to(device, self.dtype)
        matrix = torch.randn(matrices, self.tokens, self.tokens) / self.tokens**0.5
        if self.garbage:
            upper = torch.ones(self.tokens, self.tokens, dtype=torch.bool).triu(1)
            matrix = matrix.masked_fill(upper, float("nan"))
        bias = torch.randn(self.tokens, matrices).T
        norm = [(torch.randn(features) + 1).to(self.dtype), torch.randn(features).to(self.dtype)]
        operands = [both, *norm] if self.normed else list(both.chunk(2, dim=-1))
        operands += [matrix.to(self.weight_dtype), bias]
        if self.has_added:
            operands.append(torch.randn(self.tokens, self.batch, features).to(self.dtype))
        if self.experts:
            operands.append((torch.rand(self.heads, self.batch) * 3).T)
        # Halves stay views of one tensor: copies would have other strides.
        return [operand.detach().to(device).requires_grad_() for operand in operands]

    @property
    def matrix(self) -> int:
        """Return the index of M among the operands."""
        return 3 if self.normed else 2

    def upstream(self, device: str = "cpu") -> Tensor:
        torch.manual_seed(self.tokens + 1)
        shape = (self.tokens, self.batch, self.heads * self.width)
        return torch.randn(shape).to(device, self.dtype)

    def call(self, operands: list[Tensor], *, reference: bool = False) -> Tensor:
        """Call the gate, or its reference."""
        from megatron_smlp.ops import gated_mix as ops

        if self.normed:
            inputs, weight, bias, *others = operands
            gate = ops.gelu_gate_reference if reference else ops.gelu_gate
            return gate(inputs, (weight, bias, EPS), *others)
        mix: Any = ops.gated_mix_reference if reference else ops.gated_mix
        if not self.experts:
            return mix(*operands)
        *others, scales = operands
        chosen = self.chosen().to(scales.device)
        return mix(*others, routing=ops.Routing(chosen, scales, self.prefix))

    def chosen(self) -> Tensor:
        """Return the experts of the samples' heads; none chooses the last expert."""
        torch.manual_seed(self.tokens + 2)
        return torch.randint(self.experts - 1, (2, self.heads, self.batch)).int().mT


def by_kernels(gate: Gate, device: str = "cpu") -> list[Tensor]:
    """Return the operator's output and its gradients."""
    operands = gate.operands(device)
    output = gate.call(operands)
    return [output.detach(), *torch.autograd.grad(output, operands, gate.upstream(device))]


def twice(gate: Gate) -> list[list[Tensor]]:
    """Run `by_kernels`, and again with the programs of every launch in reverse order."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    place = builder.set_grid_idx

    def reversed_place(self: Any, *index: int) -> None:
        place(self, *(size - 1 - at for size, at in zip(self.grid_dim, index, strict=True)))

    first = by_kernels(gate)
    builder.set_grid_idx = reversed_place
    try:
        return [first, by_kernels(gate)]
    finally:
        builder.set_grid_idx = place


def biases_of_no_shift() -> Tensor:
    """Return db for a dg of ones whose sums over features are passed as 0."""
    from megatron_smlp.ops import gated_mix_launches as launches

    ones, plain = torch.ones(40, 2, 32), (None, None, 0)
    shifts, bias = torch.zeros(1, 40, 2, 1), torch.ones(1, 40)
    return launches.gradients_of_weights(ones, ones, shifts, bias, torch.float32, *plain)[1]


def exactly(gate: Gate, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return the same from the reference in fp64, on operands rounded as for the kernels."""
    operands = gate.operands()
    operands[gate.matrix] = operands[gate.matrix].to(gate.dtype)
    operands = [operand.detach().to(dtype).requires_grad_() for operand in operands]
    output = gate.call(operands, reference=True)
    return [output.detach(), *torch.autograd.grad(output, operands, gate.upstream().to(dtype))]


def norm_by_kernels(gate: Gate, device: str = "cpu") -> list[Tensor]:
    """Run `gelu_norm`, with gradients through both of its results."""
    from megatron_smlp.ops.gelu_norm import gelu_norm

    return _norm(gate.operands(device)[:3], gate, gelu_norm)


def norm_exactly(gate: Gate, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    from megatron_smlp.ops.gelu_norm import gelu_norm_reference

    operands = [operand.detach().to(dtype).requires_grad_() for operand in gate.operands()[:3]]
    return _norm(operands, gate, gelu_norm_reference)


def _norm(operands: list[Tensor], gate: Gate, function: Any) -> list[Tensor]:
    inputs, weight, bias = operands
    _, half = inputs.chunk(2, dim=-1)
    values, means = function(half, weight, bias, gate.heads, EPS)
    # Only the first tokens: a router reads no more of the means.
    asked = (values * gate.upstream().to(values.device)).sum() + (means[:2] ** 2).sum()
    return [values.detach(), means.detach(), *torch.autograd.grad(asked, operands)]


def with_other_tokens_from(gate: Gate, first: int) -> Tensor:
    """Return the output of `gated_mix` with v changed from a token on."""
    u1, values, *others = (operand.detach() for operand in gate.operands())
    values = values.clone()
    values[first:] += 1
    return gate.call([u1, values, *others])
