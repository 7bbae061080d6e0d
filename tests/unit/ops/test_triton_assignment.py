"""The kernels of balanced assignment, interpreted, have the properties of their reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.assignments import (
    assert_balanced,
    clustered,
    low_rank,
    one_favourite,
    optimum,
    random,
    tiny_differences,
    total,
)
from support.interpreted import interpreted
from torch import Tensor

from megatron_smlp.ops.host_assignment import host_assignment
from megatron_smlp.ops.triton_assignment import unsupported

SOLVE = "megatron_smlp.ops.triton_assignment:triton_assignment"
GOOD = {
    "random": (random, 96, 8),
    "favourite, a remainder": (one_favourite, 100, 7),
    "differences of 1e-12": (tiny_differences, 64, 3),
}
SMALLEST = "differences of 1e-12"
GOOD_SLOW = {
    "clustered": (clustered, 1024, 16),
    "random, more programs than one": (random, 1000, 64),
    "low rank, hardly a token each": (low_rank, 65, 64),
    "128 experts": (one_favourite, 513, 128),
}
EVEN = {
    "no tokens": torch.empty(0, 5),
    "one token": torch.tensor([[1.0, 2.0, 3.0]]),
    "one expert": torch.arange(7.0)[:, None],
    "fewer tokens than experts": torch.arange(40.0).view(4, 10).sin(),
    "zeros": torch.zeros(65, 4),
    "the same row": torch.arange(5.0).expand(33, 5),
    "fp64's range": torch.arange(99.0, dtype=torch.float64).view(33, 3).sin() * 1e307,
    "not finite": torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).repeat(9, 1),
}
EVEN_SLOW = {
    "wild": torch.arange(8000.0).view(1000, 8).sin()
    * torch.arange(8000.0).view(1000, 8).cos().exp(),
    "denormal": torch.arange(330.0).view(33, 10) * 1e-44,
    "half": torch.arange(900.0).view(300, 3).sin().half(),
    "bfloat16": torch.arange(900.0).view(300, 3).sin().bfloat16(),
}


def _scores(make: Callable[[int, int], Tensor], num_tokens: int, num_experts: int) -> Tensor:
    torch.manual_seed(num_tokens + num_experts)
    return make(num_tokens, num_experts)


def _solved(all_scores: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    answers = interpreted([(SOLVE, (scores,)) for scores in all_scores.values()])
    return dict(zip(all_scores, answers, strict=True))


@pytest.fixture(scope="module")
def solved() -> dict[str, tuple[Tensor, Tensor]]:
    """Solve all cases of the fast tests, in one process."""
    turned = {"turned": _scores(*GOOD[SMALLEST]).T.contiguous().T}
    return _solved({name: _scores(*case) for name, case in GOOD.items()} | EVEN | turned)


def _assert_good(scores: Tensor, experts: Tensor, prices: Tensor) -> None:
    """Check the share of the way from a random balanced assignment to the optimum."""
    assert_balanced(experts, *scores.shape)
    best, chance = optimum(scores), scores.double().mean(dim=1).sum().item()
    assert (total(scores, experts) - chance) / (best - chance) >= 0.999
    # Prices are not unique, but at them most tokens prefer the expert that they have.
    assert abs(float(prices.mean())) <= 1e-5 * float(scores.abs().max())
    preferred = (scores - prices).argmax(dim=1)
    assert (preferred == experts).float().mean() >= 0.9


@pytest.mark.parametrize("case", GOOD)
def test_reaches_nearly_the_optimum(case: str, solved: dict[str, tuple[Tensor, Tensor]]):
    _assert_good(_scores(*GOOD[case]), *solved[case])


@pytest.mark.parametrize("case", EVEN)
def test_is_balanced(case: str, solved: dict[str, tuple[Tensor, Tensor]]):
    assert_balanced(solved[case][0], *EVEN[case].shape)
    assert solved[case][1].shape == EVEN[case].shape[1:]


def test_any_strides_give_the_same_bits(solved: dict[str, tuple[Tensor, Tensor]]):
    for one, other in zip(solved[SMALLEST], solved["turned"], strict=True):
        assert torch.equal(one, other)


def test_prices_are_the_references(solved: dict[str, tuple[Tensor, Tensor]]):
    scores = _scores(*GOOD["random"])
    torch.testing.assert_close(
        solved["random"][1], host_assignment(scores)[1], atol=0.01, rtol=0.01
    )


@pytest.mark.slow
@pytest.mark.timeout(700)  # the interpreting process is ended after ten minutes
@pytest.mark.parametrize("name", [*GOOD_SLOW, *EVEN_SLOW])
def test_larger_and_wilder_scores(name: str):
    scores = _scores(*GOOD_SLOW[name]) if name in GOOD_SLOW else EVEN_SLOW[name]
    answer = _solved({name: scores})[name]
    assert_balanced(answer[0], *scores.shape)
    if name in GOOD_SLOW and scores.shape[0] > scores.shape[1] + 1:
        _assert_good(scores, *answer)


def test_what_they_cannot_do_is_said():
    assert unsupported(torch.empty(4, 128)) == ""
    assert unsupported(torch.empty(4, 129)) == "it takes at most 128 experts, not 129"
    assert "too many" in unsupported(torch.empty(1, 1).expand(2**25, 64))
