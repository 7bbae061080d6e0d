"""Score matrices for balanced assignment, and measures of an assignment."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assert_balanced(experts: Tensor, num_tokens: int, num_experts: int) -> None:
    assert experts.dtype == torch.int64
    assert experts.shape == (num_tokens,)
    counts = experts.bincount(minlength=num_experts)
    assert counts.numel() == num_experts
    assert counts.min() >= num_tokens // num_experts
    assert counts.max() <= -(-num_tokens // num_experts)


def total(scores: Tensor, experts: Tensor) -> float:
    return scores.double().gather(1, experts[:, None]).sum().item()


def optimum(scores: Tensor) -> float:
    """Return the exact optimum: one column per slot; dummy tokens fill the optional slots."""
    values = scores.double().numpy()
    num_tokens, num_experts = values.shape
    share, remainder = divmod(num_tokens, num_experts)
    if remainder == 0:
        slots = np.repeat(values, share, axis=1)
    else:
        slots = np.repeat(values, share + 1, axis=1)
        dummies = np.full((num_experts - remainder, slots.shape[1]), -1e6)
        dummies[:, share :: share + 1] = 0.0
        slots = np.concatenate([slots, dummies])
    rows, columns = linear_sum_assignment(slots, maximize=True)
    return float(slots[rows, columns][:num_tokens].sum())


def random(num_tokens: int, num_experts: int) -> Tensor:
    return torch.randn(num_tokens, num_experts)


def clustered(num_tokens: int, num_experts: int) -> Tensor:
    """Score hidden states around 12 centres against random centroids: most tokens compete."""
    centres = 2.0 * torch.randn(12, 32)
    hidden = centres[torch.randint(12, (num_tokens,))] + 0.3 * torch.randn(num_tokens, 32)
    return hidden @ torch.randn(num_experts, 32).T / 6


def low_rank(num_tokens: int, num_experts: int) -> Tensor:
    return torch.randn(num_tokens, 4) @ torch.randn(4, num_experts)


def one_favourite(num_tokens: int, num_experts: int) -> Tensor:
    return torch.randn(num_tokens, num_experts) + 5.0 * torch.randn(num_experts)


def tiny_differences(num_tokens: int, num_experts: int) -> Tensor:
    """Return float64 scores that differ only in the twelfth digit."""
    return 1.0 + 1e-12 * torch.randn(num_tokens, num_experts, dtype=torch.float64)
