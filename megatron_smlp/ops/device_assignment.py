"""Balanced assignment without host synchronization, for devices that run ahead of the host.

The problem, its three steps and the shared code are in host_assignment.py, the reference: there a
step takes as many rounds as its tokens need, for which the host must wait for the device. Here
every size and every number of rounds is fixed, so that the host never waits:

1. Prices: all tokens count at every temperature; none drops out when it is settled.
2. Rounding: a few rounds of applications. Tokens that still wait take the slots that are left, by
   number; at balancing prices there are hardly any.
3. Polishing: as there, for a fixed number of rounds; a pair without gain exchanges nothing.

Letters: N tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron_smlp.ops import host_assignment as host

_NUM_ROUNDS = 4


def device_assignment(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `priced_assignment` as a fixed sequence of operators.

    scores: <float>[N, E]; values that are not finite give some balanced assignment, no error.
    Returns the experts <int64>[N] and prices <fp32>[E], as there.
    """
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        nobody = torch.empty(0, dtype=torch.int64, device=scores.device)
        return nobody, scores.new_zeros(num_experts, dtype=torch.float32)
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        gains, unit = host.normalise(scores.detach())
        prices, temperature = _balancing_prices(gains)
        experts = _round(gains, prices, temperature)
        for _ in range(host.NUM_POLISHING_ROUNDS):
            experts = host.exchange(gains, experts)
        return experts, ((prices - prices.mean()) * unit).float()


def _balancing_prices(gains: Tensor) -> tuple[Tensor, float]:
    """gains: <float>[N, E]. Returns prices <float>[E] and the last temperature."""
    prices, temperature = gains.mean(dim=0), 1.0
    nobody = torch.zeros_like(prices)
    for level in range(host.NUM_LEVELS):
        temperature = host.TEMPERATURE_FACTOR**-level
        for _ in range(host.NUM_NEWTON_STEPS):
            step = host.newton_step(
                gains, prices, nobody, temperature=temperature, weight=1.0, total=len(gains)
            )
            prices = prices + temperature * step.clamp(-host.MAX_STEP, host.MAX_STEP)
    return prices, temperature


def _round(gains: Tensor, prices: Tensor, temperature: float) -> Tensor:
    """Turn preferences at these prices into a balanced assignment <int64>[N]."""
    num_tokens, num_experts = gains.shape
    wishes = gains - prices
    wishes += temperature * host.tie_breaker(num_tokens, num_experts, gains.device)
    room = host.slots(prices, num_tokens)
    experts = torch.full((num_tokens,), num_experts, device=gains.device)  # E: waits
    for _ in range(_NUM_ROUNDS):
        experts, room = _apply_once(wishes, experts, room)
    waiting = experts == num_experts
    number = waiting.cumsum(0) - 1
    left = torch.searchsorted(room.cumsum(0), number, right=True).clamp_(max=num_experts - 1)
    return torch.where(waiting, left, experts)


def _apply_once(wishes: Tensor, experts: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Run one round of applications by the waiting tokens.

    wishes: <float>[N, E]; experts: <int64>[N], E where a token waits; room: <int64>[E].
    Returns both after the round.
    """
    num_tokens, num_experts = wishes.shape
    choice, lead = host.first_choice(wishes.masked_fill(room == 0, -torch.inf))
    waiting = experts == num_experts
    choice = torch.where(waiting, choice, num_experts)  # the others queue nowhere
    # Sorting by lead and then, stably, by expert puts each expert's applicants best first.
    order = lead.argsort(descending=True, stable=True)
    order = order[choice[order].argsort(stable=True)]
    asked = choice[order]
    applicants = functional.one_hot(choice, num_experts + 1).sum(dim=0)
    first = applicants.cumsum(0) - applicants
    position = torch.arange(num_tokens, device=wishes.device) - first[asked]
    accepts = position < functional.pad(room, (0, 1))[asked]
    accepted = torch.empty_like(accepts).scatter_(0, order, accepts)
    return torch.where(accepted, choice, experts), room - applicants[:-1].minimum(room)
