"""Every input gives a balanced assignment, with nearly the total score of scipy's exact optimum."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
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
from torch import Tensor

from megatron_smlp.ops.balanced_assignment import balanced_assignment
from megatron_smlp.ops.device_assignment import device_assignment

Solver = Callable[[Tensor], Tensor]
SOLVERS = {"balanced": balanced_assignment, "device": lambda scores: device_assignment(scores)[0]}
both = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


@both
@pytest.mark.parametrize("make", [random, clustered, low_rank, one_favourite, tiny_differences])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(512, 64), (500, 7), (10, 64)])
def test_reaches_nearly_the_optimum(solve: Solver, make, num_tokens: int, num_experts: int):
    """Measured as a share of the way from a random balanced assignment to the optimum.

    The plain ratio says little where the optimum is near zero or negative.
    """
    torch.manual_seed(num_tokens + num_experts)
    scores = make(num_tokens, num_experts)
    experts = solve(scores)
    assert_balanced(experts, num_tokens, num_experts)
    best, chance = optimum(scores), scores.double().mean(dim=1).sum().item()
    assert (total(scores, experts) - chance) / (best - chance) >= 0.995


@both
@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 70), st.integers(1, 12)),
        elements=st.one_of(
            st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e38, 1e-45, 3.4e38]),
            st.floats(allow_nan=False, allow_infinity=False, width=32),
        ),
    )
)
def test_is_balanced_for_every_finite_input(solve: Solver, values: np.ndarray):
    assert_balanced(solve(torch.from_numpy(values)), *values.shape)


@both
@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 24), st.integers(1, 6)),
        elements=st.integers(-5, 5).map(float),
    )
)
def test_no_exchange_of_two_tokens_improves_tied_integer_scores(solve: Solver, values: np.ndarray):
    """Small integers tie all the time: the guarantee of polishing holds there, too."""
    scores = torch.from_numpy(values)
    experts = solve(scores)
    own, counts = values[np.arange(len(values)), experts], np.bincount(experts, minlength=6)
    for token, expert in enumerate(experts):
        to_others = values[token] - own[token]
        back = values[:, expert] - own
        assert (to_others[experts] + back <= 0).all()
        smaller = counts[: values.shape[1]] < counts[expert]
        assert (to_others[smaller] <= 0).all()


@both
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1001, 64), (33, 64), (7, 1)])
@pytest.mark.parametrize(
    "make",
    [
        lambda n, e: torch.zeros(n, e),
        lambda n, e: torch.randn(1, e).expand(n, e),
        lambda n, e: torch.randn(n, 1).expand(n, e),
        lambda n, e: torch.randn(3, e)[torch.arange(n) % 3],
        lambda n, e: 1e30 * torch.randn(n, e),
        lambda n, e: torch.full((n, e), -1e38),
        lambda n, e: torch.rand(n, e) * 1e-44,
        lambda n, e: torch.randn(n, e, dtype=torch.float64) * 1e307,
        lambda n, e: torch.randn(n, e) * torch.exp(15 * torch.randn(n, e)),
    ],
    ids=["zero", "same row", "same column", "3 rows", "1e30", "-1e38", "denormal", "1e307", "wild"],
)
def test_ties_and_extreme_scores_stay_balanced(
    solve: Solver, make, num_tokens: int, num_experts: int
):
    torch.manual_seed(3)
    scores = make(num_tokens, num_experts)
    assert_balanced(solve(scores), num_tokens, num_experts)


@both
def test_same_scores_give_the_same_assignment_whatever_the_random_state(solve: Solver):
    torch.manual_seed(0)
    scores = torch.randn(777, 16)
    first = solve(scores)
    torch.manual_seed(1)
    assert torch.equal(solve(scores.clone()), first)


@both
def test_any_strides_and_no_change_of_the_input(solve: Solver):
    torch.manual_seed(0)
    scores = torch.randn(16, 200)
    before = scores.clone()
    assert torch.equal(solve(scores.T), solve(scores.T.contiguous()))
    assert torch.equal(scores, before)


@both
def test_needs_no_gradient_and_works_under_autocast(solve: Solver):
    torch.manual_seed(0)
    scores = torch.randn(128, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        experts = solve(scores.clone().requires_grad_())
    assert not experts.requires_grad
    assert torch.equal(experts, solve(scores))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(bad: float):
    scores = torch.zeros(5, 3)
    scores[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 15 scores are NaN or infinite"):
        balanced_assignment(scores)
