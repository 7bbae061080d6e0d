"""Balanced assignment as a fixed sequence of Triton kernels, for devices that run ahead.

The problem, its three steps and their constants are in host_assignment.py, the reference. Here
every number of rounds is fixed and the host never waits; the differences are

1. Prices: one Newton step per temperature, with all tokens; a few steps of conjugate gradients
   solve each linear system.
2. Rounding: a few rounds of applications. Tokens that still wait take the slots left, by number.
3. Polishing: an empty slot is exchanged like a token, so that pairs need no second case.

Letters: N tokens, E experts, W = E padded to a power of 2, P programs, C = ceil(N/E).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_smlp.ops import host_assignment as host
from megatron_smlp.ops.triton_ready import FUSED

MAX_EXPERTS = 128
"""Systems of E x E are solved in the registers of one program."""
_NUM_ROUNDS = 3
_NUM_EXCHANGES = 5
_SOLVER_STEPS = 16
_TILE = 4096  # scores that a program handles at once
_MAX_PROGRAMS = 32  # each adds up what all of them found
_MAX_QUEUE = 8192  # tokens that an expert handles at once


def unsupported(scores: Tensor) -> str:
    """Return why the kernels cannot take these scores, or an empty string."""
    num_experts = scores.shape[1]
    if num_experts > MAX_EXPERTS:
        return f"it takes at most {MAX_EXPERTS} experts, not {num_experts}"
    if scores.shape[0] * num_experts >= 2**31:
        return f"{scores.shape[0]} tokens are too many for 32 bit indices"
    return ""


def triton_assignment(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `priced_assignment` by kernels: the same scores give bitwise the same result.

    scores: <float>[N, E] that `unsupported` accepts; values that are not finite give some balanced
    assignment, no error.
    Returns the experts <int64>[N] and prices <fp32>[E], as there.
    """
    from megatron_smlp.ops.kernels import assignment as kernels

    scores = scores.detach()
    num_tokens, num_experts = scores.shape
    assigned = torch.empty(num_tokens, dtype=torch.int64, device=scores.device)
    if num_tokens == 0:
        return assigned, scores.new_zeros(num_experts, dtype=torch.float32)
    priced = torch.empty(num_experts, dtype=torch.float32, device=scores.device)
    width = max(16, 1 << (num_experts - 1).bit_length())
    block = min(64, _TILE // width)
    programs = min(_MAX_PROGRAMS, 1 << (-(-num_tokens // block) - 1).bit_length())
    capacity = -(-num_tokens // num_experts)
    room = _Workspace(scores.device, num_tokens, num_experts, width, programs, capacity)
    size = {"N": num_tokens, "E": num_experts}
    tile = {"W": width, "num_warps": max(4, width // 8)} | FUSED
    given = (scores, *scores.stride())
    queue = min(_MAX_QUEUE, max(16, 1 << (num_tokens - 1).bit_length()))
    solver = {"P": programs, "DAMPING": host.DAMPING, "MAX_STEP": host.MAX_STEP}
    solver |= {"SOLVER_STEPS": _SOLVER_STEPS, "BLOCK": block}

    kernels.extent[(programs,)](*given, room.maxima, **size, **tile, BLOCK=block)
    statistics = (room.maxima, room.squares, room.columns)
    kernels.spread[(programs,)](*given, *statistics, **size, **tile, BLOCK=block, P=programs)
    temperature = 1.0
    for level in range(host.NUM_LEVELS):
        before, temperature = temperature, host.TEMPERATURE_FACTOR**-level
        kernels.balance[(programs,)](
            *(*given, *statistics, room.gains),
            *(*room.newton[(level + 1) % 2], *room.newton[level % 2]),
            *(before, temperature),
            **(size | tile | solver),
            FIRST=level == 0,
        )
    queues = (assigned, room.choices, room.leads, room.rooms, room.filled)
    for turn in range(_NUM_ROUNDS):
        kernels.choose[(programs,)](
            *(room.gains, room.maxima, room.squares),
            *(*room.newton[(host.NUM_LEVELS - 1) % 2], room.prices, priced, *queues, temperature),
            **(size | tile | solver),
            FIRST=turn == 0,
        )
        kernels.accept[(num_experts,)](
            *queues, room.members, num_tokens, capacity, BLOCK=queue, num_warps=8, **FUSED
        )
    left = (assigned, room.rooms, room.filled, room.members, room.exchanges[1][-1])
    kernels.fill[(num_experts,)](
        *left, num_tokens, capacity, W=width, BLOCK=min(queue, 1024), num_warps=4, **FUSED
    )
    _polish(room, assigned, capacity, BLOCK=block, **size, **tile)
    return assigned, priced


def _polish(room: _Workspace, assigned: Tensor, capacity: int, **size: Any) -> None:
    from megatron_smlp.ops.kernels.exchange import exchange

    size["BLOCK"] = min(size["BLOCK"], max(16, 1 << (capacity - 1).bit_length()))
    for turn in range(_NUM_EXCHANGES + 1):
        exchange[(size["E"],)](
            *(room.gains, room.members, assigned),
            *(*room.exchanges[(turn + 1) % 2], *room.exchanges[turn % 2]),
            C=capacity,
            FIRST=turn == 0,
            LAST=turn == _NUM_EXCHANGES,
            SMALLEST_GAIN=host.SMALLEST_GAIN,
            **size,
        )


class _Workspace:
    """All that the kernels pass on to each other, cut from one allocation; see kernels/."""

    def __init__(
        self, device: torch.device, tokens: int, experts: int, width: int, programs: int, slots: int
    ) -> None:
        exact = (programs, programs, programs * width)
        newton = 2 * (width, programs * width, programs * width * width)
        floats = (tokens * experts, width, *newton, experts * width, experts * width)
        counts = (tokens, tokens, width, width, experts * slots)
        exchange = 2 * (experts * width, experts * width, width)
        sizes = [2 * size for size in exact] + [*floats, *counts, *exchange]
        lines = [-(-size // 4) * 4 for size in sizes]  # each begins at a multiple of 16 bytes
        memory = torch.empty(sum(lines), dtype=torch.float32, device=device)
        parts = list(memory.split(lines))
        self.maxima, self.squares, self.columns = (part.view(torch.float64) for part in parts[:3])
        self.gains, self.prices = parts[3:5]
        best = parts[11:13]
        rest = [part.view(torch.int32) for part in parts[13:]]
        self.choices, self.leads, self.rooms, self.filled, self.members = rest[:5]
        # Double buffers: a step reads what the step before it wrote.
        self.newton = (parts[5:8], parts[8:11])
        """Two sets of prices, loads and products."""
        self.exchanges = ((best[0], *rest[5:8]), (best[1], *rest[8:11]))
        """Two sets of best, slots, movers and has_empty."""
