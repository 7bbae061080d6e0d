"""The kernels of balanced assignment up to the exchanges, which are in exchange.py.

../triton_assignment.py has the method and calls them.

A launch is the only barrier between programs. What a step needs from all tokens, the step before it
left as one partial sum per program; every program adds them up for itself, in the same order. There
are no atomics, so that the same scores give the same experts on every rank.

Letters: N tokens, E experts, W = E padded to a power of 2, P programs over tokens, C = ceil(N/E)
slots of an expert. A padded expert has gains of -inf and no slots. Token -1 is an empty slot.
"""

# Parameters of kernels have no types but constexpr: Triton derives them from each call.
import triton
import triton.language as tl


@triton.jit
def _shifted(scores, token_stride, expert_stride, tokens, experts, inside, largest):
    """Return scores over the largest one, with each token's best shifted to 0: <fp64>[BLOCK, W]."""
    at = tokens[:, None].to(tl.int64) * token_stride + experts[None, :] * expert_stride
    scaled = tl.load(scores + at, mask=inside, other=0.0).to(tl.float64) / largest
    best = tl.max(tl.where(inside, scaled, float("-inf")), axis=1)
    return tl.where(inside, scaled - best[:, None], 0.0)


@triton.jit
def _largest(maxima, P: tl.constexpr):
    largest = tl.max(tl.load(maxima + tl.arange(0, P)), axis=0)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit
def extent(scores, token_stride, expert_stride, maxima, N, E, W: tl.constexpr, BLOCK: tl.constexpr):
    """Store maxima[p]: <fp64>, the largest absolute score that this program saw."""
    experts = tl.arange(0, W)
    largest = tl.zeros([BLOCK], tl.float64)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = (tokens[:, None] < N) & (experts[None, :] < E)
        at = tokens[:, None].to(tl.int64) * token_stride + experts[None, :] * expert_stride
        values = tl.load(scores + at, mask=inside, other=0.0).to(tl.float64)
        largest = tl.maximum(largest, tl.max(tl.abs(values), axis=1))
    tl.store(maxima + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def spread(
    scores,
    token_stride,
    expert_stride,
    maxima,
    squares,
    columns,
    N,
    E,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
):
    """Store squares[p]: <fp64>, summed squares around tokens' means; columns[p, W]: summed rows."""
    experts = tl.arange(0, W)
    largest = _largest(maxima, P)
    square = tl.zeros([BLOCK], tl.float64)
    column = tl.zeros([W], tl.float64)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = (tokens[:, None] < N) & (experts[None, :] < E)
        values = _shifted(scores, token_stride, expert_stride, tokens, experts, inside, largest)
        centred = tl.where(inside, values - (tl.sum(values, axis=1) / E)[:, None], 0.0)
        square += tl.sum(centred * centred, axis=1)
        column += tl.sum(values, axis=0)
    tl.store(squares + tl.program_id(0), tl.sum(square, axis=0))
    tl.store(columns + tl.program_id(0) * W + experts, column)


@triton.jit
def _unit(squares, N, E, P: tl.constexpr):
    """Return the spread of the scores over the largest one: 1 in the unit of the gains."""
    total = tl.sum(tl.load(squares + tl.arange(0, P)), axis=0)
    spread = tl.sqrt(total / N / E)
    return tl.where(spread > 0, spread, 1.0)


@triton.jit
def _newton_step(
    prices,
    loads,
    products,
    temperature,
    N,
    E,
    W: tl.constexpr,
    P: tl.constexpr,
    DAMPING: tl.constexpr,
    MAX_STEP: tl.constexpr,
    SOLVER_STEPS: tl.constexpr,
):
    """Return prices <fp32>[W] after one step, from partial sums of the preferences at `prices`.

    The system is regular and well scaled by its diagonal, so that a few steps of conjugate
    gradients solve it: these are products with a vector, while elimination is W serial steps.
    """
    row, column = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    real = tl.arange(0, W) < E
    load = tl.zeros([W], tl.float32)
    hessian = tl.zeros([W, W], tl.float32)
    for p in range(P):
        load += tl.load(loads + p * W + tl.arange(0, W))
        hessian -= tl.load(products + p * W * W + row * W + column)
    remainder = N % E
    diagonal = load + DAMPING * N / E
    excess = load - N // E
    if remainder > 0:
        empty = 1 / (1 + tl.exp(prices / temperature))
        excess += empty - 1
        diagonal += empty * (1 - empty)
    else:
        # Equal shifts of all prices change nothing; this makes the system regular along them.
        hessian += N / (E * E)
    hessian = tl.where((row < E) & (column < E), hessian, 0.0)
    hessian += tl.where(row == column, tl.where(real, diagonal, 1.0)[:, None], 0.0)
    scale = tl.sum(tl.where(row == column, hessian, 0.0), axis=1)

    step = tl.zeros([W], tl.float32)
    rest = tl.where(real, excess, 0.0)
    along = rest / scale
    size = tl.sum(rest * along, axis=0)
    for _ in range(SOLVER_STEPS):
        product = tl.sum(hessian * along[None, :], axis=1)
        length = size / tl.maximum(tl.sum(along * product, axis=0), 1e-30)
        step += length * along
        rest -= length * product
        scaled = rest / scale
        next_size = tl.sum(rest * scaled, axis=0)
        along = scaled + next_size / tl.maximum(size, 1e-30) * along
        size = next_size
    step = tl.minimum(tl.maximum(step, -MAX_STEP), MAX_STEP)
    return prices + temperature * step


@triton.jit
def _first_prices(squares, columns, N, E, W: tl.constexpr, P: tl.constexpr):
    """Return the mean gain of each expert."""
    column = tl.zeros([W], tl.float64)
    for p in range(P):
        column += tl.load(columns + p * W + tl.arange(0, W))
    return (column / N / _unit(squares, N, E, P)).to(tl.float32)


@triton.jit
def balance(
    scores, token_stride, expert_stride, maxima, squares, columns, gains,
    prices_before, loads_before, products_before, prices, loads, products,
    temperature_before, temperature,
    N, E, W: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    FIRST: tl.constexpr, DAMPING: tl.constexpr, MAX_STEP: tl.constexpr,
    SOLVER_STEPS: tl.constexpr,
):  # fmt: skip
    """Take the step that the previous launch prepared, and prepare the next at this temperature.

    q = softmax((gains - prices) / temperature): loads[p, W] = sums of q, products[p, W, W] = q' q.
    The first launch computes the gains <fp32>[N, E]; whatever is not finite becomes 0.
    """
    experts = tl.arange(0, W)
    if FIRST:
        largest, unit = _largest(maxima, P), _unit(squares, N, E, P)
        price = _first_prices(squares, columns, N, E, W, P)
        price = tl.where(tl.abs(price) < float("inf"), price, 0.0)
    else:
        price = tl.load(prices_before + experts)
        price = _newton_step(
            *(price, loads_before, products_before, temperature_before, N, E),
            *(W, P, DAMPING, MAX_STEP, SOLVER_STEPS),
        )
    if tl.program_id(0) == 0:
        tl.store(prices + experts, price)
    load = tl.zeros([W], tl.float32)
    product = tl.zeros([W, W], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = (tokens[:, None] < N) & (experts[None, :] < E)
        at = tokens[:, None].to(tl.int64) * E + experts[None, :]
        if FIRST:
            shifted = _shifted(
                scores, token_stride, expert_stride, tokens, experts, inside, largest
            )
            gain = (shifted / unit).to(tl.float32)
            gain = tl.where(tl.abs(gain) < float("inf"), gain, 0.0)
            tl.store(gains + at, gain, mask=inside)
        else:
            gain = tl.load(gains + at, mask=inside, other=0.0)
        wish = tl.where(experts[None, :] < E, (gain - price[None, :]) / temperature, float("-inf"))
        preference = tl.exp(wish - tl.max(wish, axis=1)[:, None])
        preference = preference / tl.sum(preference, axis=1)[:, None]
        preference = tl.where(inside, preference, 0.0)
        load += tl.sum(preference, axis=0)
        # Three digits of the Hessian are plenty: the loads, which decide, are exact.
        product = tl.dot(tl.trans(preference), preference, product, input_precision="tf32")
    tl.store(loads + tl.program_id(0) * W + experts, load)
    at = experts[:, None] * W + experts[None, :]
    tl.store(products + tl.program_id(0) * W * W + at, product)


@triton.jit
def _room(price, N, E, W: tl.constexpr):
    """Return each expert's slots, <int32>[W]: the highest prices have the larger share."""
    row, column = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    other, own = price[None, :], price[:, None]
    dearer = ((other > own) | ((other == own) & (column < row))) & (column < E)
    rank = tl.sum(dearer.to(tl.int32), axis=1)
    room = N // E + (rank < N % E).to(tl.int32)
    return tl.where(tl.arange(0, W) < E, room, 0)


@triton.jit
def choose(
    gains, maxima, squares, prices_before, loads_before, products_before,
    prices, priced, assigned, choices, leads, rooms, filled, temperature,
    N, E, W: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    FIRST: tl.constexpr, DAMPING: tl.constexpr, MAX_STEP: tl.constexpr,
    SOLVER_STEPS: tl.constexpr,
):  # fmt: skip
    """Let each waiting token name the expert it prefers among those with room, and by how much.

    choices: <int32>[N], -1 for a token that has its slot; leads: <int32>[N], the lead over the
    second choice as the bits of a float >= 0, which are ordered like the float. The first launch
    takes the last step of the prices, and initializes rooms and filled <int32>[W], each expert's
    slots and how many are taken, and priced <fp32>[E], the prices in the unit of the scores.
    """
    experts = tl.arange(0, W)
    if FIRST:
        price = tl.load(prices_before + experts)
        price = _newton_step(
            *(price, loads_before, products_before, temperature, N, E),
            *(W, P, DAMPING, MAX_STEP, SOLVER_STEPS),
        )
        room = _room(price, N, E, W)
        if tl.program_id(0) == 0:
            tl.store(prices + experts, price)
            tl.store(rooms + experts, room)
            tl.store(filled + experts, tl.zeros([W], tl.int32))
            mean = tl.sum(tl.where(experts < E, price, 0.0), axis=0) / E
            unit = _unit(squares, N, E, P) * tl.max(tl.load(maxima + tl.arange(0, P)), axis=0)
            answer = ((price - mean).to(tl.float64) * unit).to(tl.float32)
            tl.store(priced + experts, answer, mask=experts < E)
        has_room = room > 0
    else:
        price = tl.load(prices + experts)
        has_room = tl.load(rooms + experts) > tl.load(filled + experts)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        waits = tokens < N
        if not FIRST:
            waits = waits & (tl.load(assigned + tokens, mask=tokens < N, other=0) < 0)
        inside = waits[:, None] & (experts[None, :] < E)
        at = tokens[:, None].to(tl.int64) * E + experts[None, :]
        gain = tl.load(gains + at, mask=inside, other=0.0)
        # Spread evenly over each token's experts and over the tokens: identical tokens separate.
        number = (
            tokens[:, None].to(tl.uint32) * 2654435769 + experts[None, :].to(tl.uint32) * 3242174889
        )
        tie = (number >> 8).to(tl.float32) / 16777216.0
        wish = gain - price[None, :] + temperature * tie
        wish = tl.where(has_room[None, :] & (experts[None, :] < E), wish, float("-inf"))
        best, choice = tl.max(wish, axis=1, return_indices=True)
        others = tl.where(experts[None, :] == choice[:, None], float("-inf"), wish)
        lead = best - tl.max(others, axis=1)
        lead = tl.where(lead >= 0, lead, 0.0)
        tl.store(choices + tokens, tl.where(waits, choice, -1), mask=tokens < N)
        tl.store(leads + tokens, lead.to(tl.int32, bitcast=True), mask=tokens < N)
        if FIRST:
            tl.store(assigned + tokens, tl.full([BLOCK], -1, tl.int64), mask=tokens < N)


@triton.jit
def _applicants(choices, leads, expert, start, N, BLOCK: tl.constexpr):
    tokens = start + tl.arange(0, BLOCK)
    applies = tl.load(choices + tokens, mask=tokens < N, other=-1) == expert
    lead = tl.load(leads + tokens, mask=tokens < N, other=0)
    return tokens, applies, lead


@triton.jit
def _count(choices, leads, expert, least, N, BLOCK: tl.constexpr):
    """Count the expert's applicants that have at least this lead."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        _, applies, lead = _applicants(choices, leads, expert, start, N, BLOCK)
        found += (applies & (lead >= least)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def accept(assigned, choices, leads, rooms, filled, members, N, C, BLOCK: tl.constexpr):
    """Program e: expert e takes those of its applicants that would lose most elsewhere.

    assigned: <int64>[N], each token's expert; members: <int32>[E, C], the tokens in the slots. Of
    equal leads the first tokens are taken.
    """
    expert = tl.program_id(0)
    before = tl.load(filled + expert)
    free = tl.load(rooms + expert) - before
    least = 0
    if _count(choices, leads, expert, 0, N, BLOCK) > free:
        # The largest lead that `free` or more applicants reach, bit by bit.
        for bit in range(31):
            raised = least | (1 << (30 - bit))
            if _count(choices, leads, expert, raised, N, BLOCK) >= free:
                least = raised
    above = 0
    if least < 2147483647:
        above = _count(choices, leads, expert, least + 1, N, BLOCK)
    equal, taken = 0, 0
    for start in range(0, N, BLOCK):
        tokens, applies, lead = _applicants(choices, leads, expert, start, N, BLOCK)
        equals = (applies & (lead == least)).to(tl.int32)
        rank = equal + tl.cumsum(equals, axis=0) - equals
        takes = (applies & (lead > least)) | ((equals > 0) & (rank < free - above))
        slot = before + taken + tl.cumsum(takes.to(tl.int32), axis=0) - 1
        tl.store(members + expert * C + slot, tokens, mask=takes)
        tl.store(assigned + tokens, tl.full([BLOCK], 0, tl.int64) + expert, mask=takes)
        equal += tl.sum(equals, axis=0)
        taken += tl.sum(takes.to(tl.int32), axis=0)
    tl.store(filled + expert, before + taken)


@triton.jit
def fill(
    assigned,
    rooms,
    filled,
    members,
    has_empty,
    N,
    C,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program e: fill the slots that expert e has left with tokens that still wait, by number.

    members: as in `accept`; a smaller expert's slot that stays empty is -1. has_empty: <int32>[W].
    """
    expert = tl.program_id(0)
    experts = tl.arange(0, W)
    free = tl.load(rooms + experts) - tl.load(filled + experts)
    first = tl.sum(tl.where(experts < expert, free, 0), axis=0)
    before, room = tl.load(filled + expert), tl.load(rooms + expert)
    seen = 0
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        waits = (tl.load(assigned + tokens, mask=tokens < N, other=0) < 0).to(tl.int32)
        rank = seen + tl.cumsum(waits, axis=0) - waits
        takes = (waits > 0) & (rank >= first) & (rank < first + room - before)
        tl.store(members + expert * C + before + rank - first, tokens, mask=takes)
        seen += tl.sum(waits, axis=0)
    tl.store(members + expert * C + C - 1, -1, mask=room < C)
    tl.store(has_empty + expert, (room < C).to(tl.int32))
