"""The causal gate and its gradients, of operands drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """One call: its sizes and dtypes."""

    tokens: int
    batch: int
    heads: int
    width: int
    dtype: torch.dtype
    weight_dtype: torch.dtype = torch.float32
    has_added: bool = False
    garbage: bool = False
    """NaN above the diagonal of M."""

    def operands(self) -> list[Tensor]:
        """u1, v, M, b and what is added; u1 and v are halves of one tensor, as in a layer."""
        torch.manual_seed(self.tokens)
        features = self.heads * self.width
        both = torch.randn(self.tokens, self.batch, 2 * features).to(self.dtype)
        matrix = torch.randn(self.heads, self.tokens, self.tokens) / self.tokens**0.5
        if self.garbage:
            upper = torch.ones(self.tokens, self.tokens, dtype=torch.bool).triu(1)
            matrix = matrix.masked_fill(upper, float("nan"))
        bias = torch.randn(self.heads, self.tokens)
        operands = [*both.chunk(2, dim=-1), matrix.to(self.weight_dtype), bias]
        if self.has_added:
            operands.append(torch.randn(self.tokens, self.batch, features).to(self.dtype))
        return [operand.detach().requires_grad_() for operand in operands]

    def upstream(self) -> Tensor:
        torch.manual_seed(self.tokens + 1)
        shape = (self.tokens, self.batch, self.heads * self.width)
        return torch.randn(shape).to(self.dtype)


def by_kernels(gate: Gate) -> list[Tensor]:
    """The output of `gated_mix` and its gradients."""
    from megatron_smlp.ops.gated_mix import gated_mix

    operands = gate.operands()
    output = gated_mix(*operands)
    return [output.detach(), *torch.autograd.grad(output, operands, gate.upstream())]


def exactly(gate: Gate) -> list[Tensor]:
    """The same by the slow twin in fp64, of operands as they are rounded for the kernels."""
    from megatron_smlp.ops.gated_mix import gated_mix_reference

    operands = gate.operands()
    operands[2] = operands[2].to(gate.dtype)
    operands = [operand.detach().double().requires_grad_() for operand in operands]
    output = gated_mix_reference(*operands)
    return [output.detach(), *torch.autograd.grad(output, operands, gate.upstream().double())]


def with_other_tokens_from(gate: Gate, first: int) -> Tensor:
    """The output of `gated_mix` where v is another from a token on."""
    from megatron_smlp.ops.gated_mix import gated_mix

    u1, values, *others = (operand.detach() for operand in gate.operands())
    values = values.clone()
    values[first:] += 1
    return gated_mix(u1, values, *others)
