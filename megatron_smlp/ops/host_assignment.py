"""Balanced assignment on a CPU, in three steps: prices, rounding, polishing.

    maximize  sum over i of s[i, a(i)]    subject to    floor(N/E) <= |{i: a(i) = e}| <= ceil(N/E)

This is the routing of BASE layers (Lewis et al. 2021, arXiv 2103.16716, equation 3), which solve it
with an auction. An auction needs N to be a multiple of E and may not terminate on tied scores; here
three steps follow one another, each of bounded length:

1. Prices. The dual has one price per expert: token i prefers the expert with the largest
   s[i, e] - p[e]. Smoothed by a temperature tau, preferences are q = softmax((s - p) / tau), and
   the prices that balance them follow from Newton's method with the E x E Hessian
   (diag(n) - q'q) / tau, n = sum_i q_i. tau falls, level by level, from the spread of the scores.
2. Rounding. Tokens apply to their preferred expert among those with room; each expert takes those
   that would lose most elsewhere. Only full experts turn tokens away, so at most E rounds.
3. Polishing. Pairs of experts exchange the two tokens that gain most by it, never at a loss.

Where N is not a multiple of E, one slot of each expert is optional. It stays empty with probability
v = sigmoid(-p / tau), and n + v = ceil(N/E) is solved instead, so the prices also find the experts
that deserve the larger share.

Letters: N tokens, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional

# Chosen on random, clustered and low-rank scores; see benchmarks/bench_assignment.py.
NUM_LEVELS = 12
NUM_NEWTON_STEPS = 2
TEMPERATURE_FACTOR = 2.2
MAX_STEP = 2.0  # of a price in one Newton step, in temperatures
DAMPING = 1e-2  # of the Hessian, in tokens per expert
# Above this temperature prices are rough, and a sample of the tokens can stand for all.
_SAMPLING_TEMPERATURE = 0.2
_SAMPLED_TOKENS_PER_EXPERT = 32
# A token whose first choice leads by this many temperatures is settled: it drops out of the sums.
_SETTLED_LEAD = 16.0
_SMALLEST_PREFERENCE = 1e-9
NUM_POLISHING_ROUNDS = 8
# Of an exchange; above float32 rounding of the sum, so that the loop cannot cycle.
SMALLEST_GAIN = 1e-5


def host_assignment(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return experts <int64>[N] and prices <fp32>[E], as `balanced_assignment.priced_assignment`.

    scores: <float>[N, E], finite.
    """
    if scores.shape[0] == 0:
        nobody = torch.empty(0, dtype=torch.int64, device=scores.device)
        return nobody, scores.new_zeros(scores.shape[1], dtype=torch.float32)
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        gains, unit = normalise(scores.detach())
        prices, temperature = _balancing_prices(gains)
        experts = _polish(gains, _round(gains, prices, temperature))
        return experts, ((prices - prices.mean()) * unit).float()


def normalise(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same problem in float32 with a spread of 1, and the scale that restores the
    scores.

    A constant added to a token's row changes no assignment, so rows are shifted to a maximum of 0.
    float64, and dividing before subtracting, keep scores such as 1e308 and 1e-320 in range.
    """
    scaled = scores.double()
    largest = scaled.abs().amax()
    scaled = scaled / torch.where(largest > 0, largest, 1.0)
    scaled = scaled - scaled.amax(dim=1, keepdim=True)
    spread = (scaled - scaled.mean(dim=1, keepdim=True)).square().mean().sqrt()
    spread = torch.where(spread > 0, spread, 1.0)
    return (scaled / spread).float(), spread * largest


def _balancing_prices(gains: Tensor) -> tuple[Tensor, float]:
    """gains: <float>[N, E]. Returns prices <float>[E] and the last temperature."""
    num_tokens, num_experts = gains.shape
    stride = max(1, num_tokens // (_SAMPLED_TOKENS_PER_EXPERT * num_experts))
    prices, temperature = gains.mean(dim=0), 1.0
    fixed_load = torch.zeros_like(prices)
    for level in range(NUM_LEVELS):
        temperature = TEMPERATURE_FACTOR**-level
        sampling = temperature > _SAMPLING_TEMPERATURE and stride > 1
        sample = gains[::stride] if sampling else gains
        weight = num_tokens / sample.shape[0] if sampling else 1.0
        for _ in range(NUM_NEWTON_STEPS):
            step = newton_step(
                sample,
                prices,
                fixed_load,
                temperature=temperature,
                weight=weight,
                total=num_tokens,
            )
            prices = prices + temperature * step.clamp(-MAX_STEP, MAX_STEP)
        if not sampling:
            choice, lead = first_choice(gains - prices)
            settled = lead > _SETTLED_LEAD * temperature
            fixed_load += choice[settled].bincount(minlength=num_experts)
            gains = gains[~settled]
    return prices, temperature


def newton_step(
    gains: Tensor,
    prices: Tensor,
    fixed_load: Tensor,
    *,
    temperature: float,
    weight: float,
    total: int,
) -> Tensor:
    """Return the change of the prices <float>[E], in units of the temperature.

    gains: <float>[n, E], the tokens that are not settled, each of which stands for `weight`.
    fixed_load: <float>[E], the settled tokens of each expert. total: N.
    """
    num_experts = gains.shape[1]
    preferences = ((gains - prices) / temperature).softmax(dim=1)
    # Without this, products of two tiny preferences are denormal, which makes a GEMM crawl.
    preferences = functional.threshold(preferences, _SMALLEST_PREFERENCE, 0.0)
    load = preferences.sum(dim=0) * weight
    hessian = (preferences.T @ preferences) * -weight
    diagonal = load + DAMPING * total / num_experts
    share, remainder = divmod(total, num_experts)
    excess = load + fixed_load - share
    if remainder:
        empty = torch.sigmoid(-prices / temperature)
        excess = excess + empty - 1
        diagonal = diagonal + empty * (1 - empty)
    else:
        # Equal shifts of all prices change nothing; this makes the system regular along them.
        hessian += total / num_experts**2
    hessian.diagonal().add_(diagonal)
    # Without a check, which would make the host wait: the damping makes it regular.
    return torch.linalg.solve_ex(hessian, excess)[0]


def first_choice(wishes: Tensor) -> tuple[Tensor, Tensor]:
    """wishes: <float>[n, E]. Returns the best expert <int64>[n] and its lead <float>[n]."""
    best, choice = wishes.max(dim=1)
    second = wishes.scatter(1, choice[:, None], -torch.inf).amax(dim=1)
    return choice, best - second


def tie_breaker(num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """Return <float>[N, E] in [0, 1), evenly over each token's experts and over the tokens."""
    golden, plastic = 0.6180339887, 0.7548776662
    tokens = torch.arange(num_tokens, dtype=torch.float64, device=device) * golden
    experts = torch.arange(num_experts, dtype=torch.float64, device=device) * plastic
    return (tokens.frac().float()[:, None] + experts.frac().float()).frac()


def slots(prices: Tensor, num_tokens: int) -> Tensor:
    """Return each expert's slots, <int64>[E]; the highest prices have the larger share."""
    share, remainder = divmod(num_tokens, len(prices))
    room = torch.full((len(prices),), share, device=prices.device)
    room[prices.argsort(descending=True, stable=True)[:remainder]] += 1
    return room


def _round(gains: Tensor, prices: Tensor, temperature: float) -> Tensor:
    """Turn preferences at these prices into a balanced assignment <int64>[N]."""
    num_tokens, num_experts = gains.shape
    room = slots(prices, num_tokens)
    # Identical tokens would all apply to the same expert. At prices that balance them they are
    # indifferent to within the temperature, so this much spreads them and costs nothing.
    wishes = gains - prices
    wishes += temperature * tie_breaker(num_tokens, num_experts, gains.device)
    experts = torch.empty(num_tokens, dtype=torch.int64, device=gains.device)
    waiting = torch.arange(num_tokens, device=gains.device)
    while waiting.numel():
        choice, accepted = _apply_once(wishes[waiting], room)
        experts[waiting[accepted]] = choice[accepted]
        room = room - choice[accepted].bincount(minlength=num_experts)
        waiting = waiting[~accepted]
    return experts


def _apply_once(wishes: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Run one round of applications.

    wishes: <float>[n, E]; room: <int64>[E], free slots.
    Returns the expert applied to <int64>[n] and whether it accepted <bool>[n].
    """
    choice, lead = first_choice(wishes.masked_fill(room == 0, -torch.inf))
    # Sorting by lead and then, stably, by expert puts each expert's applicants best first.
    order = lead.argsort(descending=True, stable=True)
    order = order[choice[order].argsort(stable=True)]
    applicants = choice.bincount(minlength=room.numel())
    first = applicants.cumsum(0) - applicants
    position = torch.arange(order.numel(), device=order.device) - first[choice[order]]
    accepted = torch.empty_like(choice, dtype=torch.bool)
    accepted[order] = position < room[choice[order]]
    return choice, accepted


def _polish(gains: Tensor, experts: Tensor) -> Tensor:
    """Exchange tokens between disjoint pairs of experts while that raises the sum."""
    for _ in range(NUM_POLISHING_ROUNDS):
        before, experts = experts, exchange(gains, experts)
        if torch.equal(before, experts):
            break
    return experts


def exchange(gains: Tensor, experts: Tensor) -> Tensor:
    """Let disjoint pairs of experts exchange their best movers, where that raises the sum.

    gains: <float>[N, E]; experts: <int64>[N]. Returns <int64>[N].
    """
    num_tokens, num_experts = gains.shape
    change = gains - gains.gather(1, experts[:, None])
    move, free_slot = moves(change, experts)
    best_move = torch.maximum(move, free_slot)
    gain, partner = (best_move + best_move.T).fill_diagonal_(-torch.inf).max(dim=1)
    own = torch.arange(num_experts, device=gains.device)
    mutual = (partner[partner] == own) & (gain > SMALLEST_GAIN)
    # One of the two may give an empty slot instead of a token.
    leaves = mutual & (move[own, partner] >= free_slot[own, partner])
    mover = best_mover(change, experts, own, partner)
    places = torch.where(leaves, mover, num_tokens)  # N: no token's place
    return functional.pad(experts, (0, 1)).scatter(0, places, partner)[:-1]


def moves(change: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return <float>[E, E] twice: the most that a token gains by a move from one expert to another;
    and 0 where the first can give an empty slot instead. Both are -inf where that is impossible."""
    num_tokens, num_experts = change.shape
    move = torch.full((num_experts, num_experts), -torch.inf, device=change.device)
    move = move.scatter_reduce(0, experts[:, None].expand_as(change), change, "amax")
    counts = functional.one_hot(experts, num_experts).sum(dim=0)
    smaller = counts * num_experts < num_tokens
    return move, torch.where(smaller[:, None] & ~smaller, 0.0, -torch.inf)


def best_mover(change: Tensor, experts: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return <int64>[P]: each source expert's token that gains most by going to its target."""
    candidates = change.T[target]
    return candidates.masked_fill(experts != source[:, None], -torch.inf).argmax(dim=1)
