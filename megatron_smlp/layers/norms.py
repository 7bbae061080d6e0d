"""The norm of every slot, chosen once: Transformer Engine's, Apex's, or torch's.

    LN(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias          over the last dimension

Megatron's own fallback for a machine without Apex refuses sequence parallelism, under which each
rank holds a slice of the tokens, so that its gradients of weight and bias are partial sums. The
attribute `sequence_parallel` on a parameter tells Megatron to add them up over the tensor parallel
group. The torch norms below set it, and are otherwise torch's own.

Letters: T tokens, B batch, D hidden, F gate width, h heads, f = F / h, tp tensor parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM as HAVE_APEX
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_smlp.ops.rms_norm import RowwiseRMSNorm


class TorchNorm:
    """torch's LayerNorm or RMSNorm with Megatron's signature, ready for sequence parallel."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        kinds: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": RMSNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, computed a few rows at a time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x: <float>[..., D] -> the same shape and dtype."""
        if x.device.type != "cpu":
            return super().forward(x)
        return RowwiseRMSNorm.apply(x, self.weight, self.eps)


def norm_builder(config: TransformerConfig) -> Any:
    """Return a slot's norm class: Transformer Engine's, else Apex's for LayerNorm, else torch's.

    Apex's is a CUDA kernel, and may be installed even where tensors are on the CPU.
    """
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if HAVE_APEX and config.normalization == "LayerNorm" and _is_on_cuda():
        return FusedLayerNorm
    return TorchNorm


def _is_on_cuda() -> bool:
    """Return whether this process computes on a CUDA device; platform/cpu.py makes it the CPU."""
    available = torch.cuda.is_available()
    return available and torch.device(torch.cuda.current_device()).type == "cuda"


class HeadLayerNorm(nn.Module):
    """LayerNorm over the f features of each head, also where one head spans the whole TP group.

    Args:
        num_features: F / tp, the features on this rank.
        num_heads: heads on this rank; 1 where the single head is split over `group`.
        group: the tensor parallel group that one head is split over, or None where heads are whole.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_heads: int,
        eps: float,
        dtype: torch.dtype,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.group = group
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.weight = nn.Parameter(torch.ones(num_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(num_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x: <float>[..., F / tp] -> the same shape and dtype; statistics in fp32."""
        if self.group is not None:
            return self._split(x, self.group)
        if self.num_heads == 1:
            return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        heads = x.unflatten(-1, (self.num_heads, -1))
        normed = functional.layer_norm(heads, heads.shape[-1:], eps=self.eps).flatten(-2)
        return torch.addcmul(self.bias, normed, self.weight)

    def _split(self, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        """Normalize one head split over the TP group: sum over all ranks for mean and variance."""
        features = x.shape[-1] * group.size()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide - SumOverGroup.apply(wide.sum(-1, keepdim=True), group) / features
        var = SumOverGroup.apply(wide.square().sum(-1, keepdim=True), group) / features
        normed = (wide * torch.rsqrt(var + self.eps)).to(x.dtype)
        return torch.addcmul(self.bias, normed, self.weight)


class SumOverGroup(torch.autograd.Function):
    """y = sum of x over the group, on every rank.

    Each rank then computes something different from y, so dL/dx is the sum of all ranks' dL/dy
    as well (Megatron's mappings assume instead that all ranks then compute the same).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)  # NCCL requires it
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None
