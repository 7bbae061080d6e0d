"""Differences of systems, compared with a known truth and with scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from megatron_smlp.study.spread import Spread

NAMES = tuple("abcdefghi")


def sample(sds: list[float], *, n: int, rng: np.random.Generator) -> dict[str, list[float]]:
    losses = 4 + rng.normal(size=(len(sds), n)) * np.array(sds)[:, None]
    return dict(zip(NAMES, losses.tolist(), strict=False))


def test_two_systems_are_students_test():
    one, other = [4.0, 4.02, 3.99], [4.05, 4.03, 4.06, 4.01]
    spread = Spread.of({"a": one, "b": other})
    assert spread.p == pytest.approx(stats.bartlett(one, other).pvalue)
    found = spread.difference("a", "b")
    test = stats.ttest_ind(one, other)
    assert (found.p, found.df, found.n) == (pytest.approx(test.pvalue), 5, 3)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_systems_that_agree_share_their_deviation():
    """Dunnett's variance: the within-group variance of an analysis of variance."""
    groups = sample([0.01] * 5, n=3, rng=np.random.default_rng(8))
    found = Spread.of(groups)
    within = np.mean([np.var(losses, ddof=1) for losses in groups.values()])
    assert (found.sd, found.df, found.outliers) == (pytest.approx(math.sqrt(within)), 10, ())
    assert found.p == pytest.approx(stats.bartlett(*groups.values()).pvalue)
    error = math.sqrt(within * 2 / 3)
    high = found.difference("a", "b").high - found.difference("a", "b").mean
    assert high == pytest.approx(stats.t.ppf(0.975, 10) * error)


def test_an_outlier_has_its_own_deviation_and_the_others_are_without_it():
    groups = sample([0.3, 0.01, 0.01, 0.01], n=5, rng=np.random.default_rng(2))
    found = Spread.of(groups)
    assert (found.outliers, found.pooled, found.df) == (("a",), ("b", "c", "d"), 12)
    rest = Spread.of({name: groups[name] for name in "bcd"})
    assert found.difference("b", "c") == rest.difference("b", "c")


def test_seeds_that_lie_close_by_luck_are_no_outlier():
    groups = sample([0.01] * 8, n=3, rng=np.random.default_rng(8))
    found = Spread.of(groups | {"i": [4.0, 4.000001, 3.999999]})
    assert ("i" in found.pooled, found.p < 0.01) == (True, True)


def test_two_that_disagree_are_welchs_test():
    one, other = [4.0, 4.2, 3.9, 4.4], [4.05, 4.051, 4.049, 4.052]
    found = Spread.of({"a": one, "b": other}).difference("a", "b")
    test = stats.ttest_ind(one, other, equal_var=False)
    assert (found.p, found.df) == pytest.approx((test.pvalue, test.df))


def test_one_seed_has_the_deviation_of_the_others():
    """It is shown with its interval; a verdict takes three seeds."""
    groups = sample([0.01] * 4, n=3, rng=np.random.default_rng(6)) | {"e": [4.1]}
    found = Spread.of(groups)
    half = found.mean("e").high - 4.1
    assert half == pytest.approx(stats.t.ppf(0.975, found.df) * found.sd)
    assert found.difference("a", "e").n == 1


def test_a_run_that_diverged_or_is_missing_leaves_its_own_pairs_unknown():
    groups = sample([0.01] * 4, n=3, rng=np.random.default_rng(7))
    found = Spread.of(groups | {"a": [math.inf, 4.0, 4.0], "b": []})
    for name in "ab":
        one = found.difference("c", name)
        assert (one.low, one.high, one.p) == (-math.inf, math.inf, 1.0)
    assert (found.df, found.difference("c", "d").p < 1) == (4, True)
