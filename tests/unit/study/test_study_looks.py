"""The primary comparison: the alpha that its looks spend, and their verdicts."""

import math

import numpy as np
import pytest
from scipy import stats

from megatron_smlp.study.looks import LOOKS, looks, spent
from megatron_smlp.study.statistics import ALPHA, CONFIRMED, LEVEL, REFUTED, UNDECIDED


def pair(gap: float, *, rng: np.random.Generator, sd: float = 0.013) -> tuple[list, list]:
    return tuple((rng.normal(size=(2, 8)) * sd + np.array([[-gap], [0.0]])).tolist())


def test_alpha_is_spent_like_o_brien_and_flemings():
    """ldbounds of R: alpha(t) = 4 - 4 Phi(z(1 - alpha / 4) / sqrt(t)), at 3/8, 5/8 and 1."""
    assert [spent(n) for n in LOOKS] == pytest.approx([0.000252 * 2, 0.00458 * 2, ALPHA], rel=0.02)


def test_a_look_is_students_test_at_its_share_of_alpha():
    one, other = pair(0.02, rng=np.random.default_rng(1))
    made = looks(one, other)
    for each, n in zip(made, LOOKS, strict=False):
        test = stats.ttest_ind(one[:n], other[:n])
        interval = test.confidence_interval(1 - each.alpha)
        assert each.difference.p == pytest.approx(test.pvalue)
        assert (each.difference.low, each.difference.high) == pytest.approx(tuple(interval))
    assert sum(each.alpha for each in made) == pytest.approx(made[-1].spent)


@pytest.mark.parametrize(("n", "count"), [(2, 0), (3, 1), (4, 1), (5, 2), (7, 2), (8, 3), (12, 3)])
def test_a_look_is_made_when_it_is_due(n: int, count: int):
    rng = np.random.default_rng(2)
    assert len(looks(list(rng.normal(size=n)), list(rng.normal(size=n + 1)))) == count


def test_more_seeds_change_no_look_that_was_made():
    one, other = pair(0.0, rng=np.random.default_rng(3))
    assert looks(one, other)[:2] == looks(one[:6], other[:5])


def test_it_ends_with_the_look_that_decides():
    one, other = pair(0.5, rng=np.random.default_rng(4))
    assert [each.verdict for each in looks(one, other)] == [CONFIRMED]
    assert [each.verdict for each in looks(other, one)] == [REFUTED]


def test_level_is_told_at_the_last_look_alone():
    rng = np.random.default_rng(6)
    ends = [looks(*pair(0.0, rng=rng, sd=0.005)) for _ in range(40)]
    said = [[each.verdict for each in made] for made in ends]
    assert said.count([UNDECIDED, UNDECIDED, LEVEL]) > 30


def test_a_run_that_diverged_decides_nothing():
    one, other = pair(0.5, rng=np.random.default_rng(7))
    made = looks([math.inf, *one[1:]], other)
    assert [each.verdict for each in made] == [UNDECIDED] * 3
