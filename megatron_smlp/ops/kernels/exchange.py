"""The last kernel of balanced assignment: pairs of experts exchange tokens. See assignment.py.

Letters: N tokens, E experts, W = E padded to a power of 2, C = ceil(N/E) slots of an expert. Token
-1 is an empty slot.
"""

# Parameters of kernels have no types but constexpr: Triton derives them from each call.
import triton
import triton.language as tl


@triton.jit
def _swapped(best, slots, movers, empties, expert, E, W: tl.constexpr, SMALLEST_GAIN: tl.constexpr):
    """Return, from the launch before, which slot of this expert gets which token, -1 if none, and
    `empties` after all exchanges."""
    row, column = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    experts = tl.arange(0, W)
    pairs = (row < E) & (column < E) & (row != column)
    there = tl.load(best + row * W + column, mask=pairs, other=float("-inf"))
    back = tl.load(best + column * W + row, mask=pairs, other=float("-inf"))
    total, partner = tl.max(there + back, axis=1, return_indices=True)
    is_partner = column == partner[:, None]
    partners_own = tl.sum(tl.where(is_partner, partner[None, :], 0), axis=1)
    swaps = (partners_own == experts) & (total > SMALLEST_GAIN)
    out = tl.load(movers + row * W + column, mask=pairs & is_partner, other=0)
    into = tl.load(movers + column * W + row, mask=pairs & is_partner, other=0)
    out, into = tl.sum(out, axis=1), tl.sum(into, axis=1)
    keeps = (empties > 0) & (out >= 0)
    empties = tl.where(swaps, ((into < 0) | keeps).to(tl.int32), empties)
    is_own = experts == expert
    slot, incoming = -1, -1
    if tl.sum((is_own & swaps).to(tl.int32), axis=0) > 0:
        slot = tl.load(slots + expert * W + tl.sum(tl.where(is_own, partner, 0), axis=0))
        incoming = tl.sum(tl.where(is_own, into, 0), axis=0)
    return slot, incoming, empties


@triton.jit
def _best_moves(
    gains, tokens, there_is, is_slot, empties, expert, E, W: tl.constexpr, BLOCK: tl.constexpr
):
    """Return, for each other expert, the most that one slot of a block gains there, its place in
    the block, and its token. Each [W]."""
    column = tl.arange(0, W)[None, :]
    at = tokens.to(tl.int64) * E
    own = tl.load(gains + at + expert, mask=there_is, other=0.0)
    inside = there_is[:, None] & (column < E)
    gain = tl.load(gains + at[:, None] + column, mask=inside, other=0.0)
    change = gain - own[:, None]
    may = is_slot[:, None] & (there_is[:, None] | (empties[None, :] == 0))
    change = tl.where(may, change, float("-inf"))
    most, place = tl.max(change, axis=0, return_indices=True)
    chosen = tl.arange(0, BLOCK)[:, None] == place[None, :]
    return most, place, tl.sum(tl.where(chosen, tokens[:, None], 0), axis=0)


@triton.jit
def exchange(
    gains, members, assigned,
    best_before, slots_before, movers_before, has_empty_before,
    best, slots, movers, has_empty,
    N, E, C, W: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, SMALLEST_GAIN: tl.constexpr,
):  # fmt: skip
    """Program e: apply the exchange that the launch before found for expert e, and find the next.

    best: <fp32>[E, W], the most that one member of e gains in each other expert; slots and movers:
    <int32>[E, W], its slot and the token itself. Two experts exchange their best movers if each
    gains more with the other than with any third. An empty slot moves like a token that gains 0
    everywhere, but never to an expert that has one already. The last launch writes the answer.
    """
    expert = tl.program_id(0)
    experts = tl.arange(0, W)
    empties = tl.load(has_empty_before + experts, mask=experts < E, other=1)
    slot, incoming = -1, -1
    if not FIRST:
        slot, incoming, empties = _swapped(
            *(best_before, slots_before, movers_before, empties, expert, E, W, SMALLEST_GAIN)
        )
    top = tl.full([W], float("-inf"), tl.float32)
    top_slot, top_token = tl.zeros([W], tl.int32), tl.zeros([W], tl.int32)
    for start in range(0, C, BLOCK):
        places = start + tl.arange(0, BLOCK)
        tokens = tl.load(members + expert * C + places, mask=places < C, other=-1)
        tokens = tl.where(places == slot, incoming, tokens)
        if not FIRST:
            tl.store(members + expert * C + places, tokens, mask=places < C)
        there_is = (places < C) & (tokens >= 0)
        if LAST:
            own = tl.full([BLOCK], 0, tl.int64) + expert
            tl.store(assigned + tokens, own, mask=there_is)
        else:
            most, place, token = _best_moves(
                gains, tokens, there_is, places < C, empties, expert, E, W, BLOCK
            )
            better = most > top
            top = tl.where(better, most, top)
            top_slot = tl.where(better, start + place, top_slot)
            top_token = tl.where(better, token, top_token)
    if not LAST:
        tl.store(best + expert * W + experts, top)
        tl.store(slots + expert * W + experts, top_slot)
        tl.store(movers + expert * W + experts, top_token)
        tl.store(has_empty + expert, tl.sum(tl.where(experts == expert, empties, 0), axis=0))
