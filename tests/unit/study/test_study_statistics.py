"""Statistics, compared with known answers and with scipy."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from megatron_smlp.study.spread import Spread
from megatron_smlp.study.statistics import (
    CONFIRMED,
    LEVEL,
    REFUTED,
    UNDECIDED,
    Difference,
    cost_to_reach,
    crossings,
    holm,
    level,
    paired,
    plus,
    verdict,
    verdict_of_all,
    verdicts,
    visible,
    with_holm,
)

SEEDS = (11, 12, 13)


class TestPairedDifference:
    def test_against_scipy(self):
        one, other = [3.9, 3.93, 3.96], [4.0, 4.01, 3.99]
        found = paired(dict(zip(SEEDS, one, strict=True)), dict(zip(SEEDS, other, strict=True)))
        test = stats.ttest_rel(one, other)
        assert found.p == pytest.approx(test.pvalue)
        assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))

    @pytest.mark.parametrize(("n", "comparisons"), [(3, 1), (3, 7), (10, 3)])
    def test_what_is_visible_passes_holms_first_step_with_its_power(self, n: int, comparisons: int):
        """In 100,000 studies whose other comparisons find nothing: the test's own p at alpha / m.

        A sum of Student's quantiles at alpha, in place of noncentral Student's at alpha / m, gave
        0.77 for three seeds and one comparison, and 0.19 for seven."""
        rng, sd = np.random.default_rng(100 * n + comparisons), 0.01
        one = Difference(mean=-1, low=-2, high=0, p=0.01, n=n, error=sd / math.sqrt(n), df=n - 1)
        each = with_holm(dict.fromkeys(range(comparisons), one), is_conjunction=False)
        gap = each[0].visible
        values = rng.normal(-gap, sd, size=(100_000, n))
        p = stats.ttest_1samp(values, 0.0, axis=1, alternative="two-sided").pvalue
        power = np.mean((p * comparisons < 0.05) & (values.mean(axis=1) < 0))
        assert power == pytest.approx(0.8, abs=0.005)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ((), ()), ((3.0,), (4.0,)), ((3.0, 3.0), (4.0, 4.0)), ((4.0, 3.0), (4.0, 3.0)),
            ((math.inf, 3.0, 3.0), (4.0, 4.0, 4.0)),
        ],
    )  # fmt: skip
    def test_too_few_seeds_and_a_diverged_run_are_undecided(self, one, other):
        found = paired(dict(enumerate(one)), dict(enumerate(other)))
        assert (found.n, verdict(found)) == (len(one), UNDECIDED)


class TestHolm:
    def test_cases_by_hand(self):
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.9, 0.6]) == [1.0, 1.0]

    def test_pairs_of_no_claim_need_more_the_more_there_are(self):
        one = Difference(mean=-1, low=-1.5, high=-0.5, p=0.03, n=3, error=0.06, df=2)
        for count, said in ((1, CONFIRMED), (2, UNDECIDED)):
            both = with_holm(dict.fromkeys(range(count), one), is_conjunction=False)
            assert set(verdicts(both, is_conjunction=False).values()) == {said}


def difference(mean: float, *, p: float, sd: float = 0.02) -> Difference:
    """Return a difference of three seeds with this p."""
    half = 1.1 * abs(mean) if p >= 0.05 else 0.9 * abs(mean)
    error = sd / math.sqrt(3)
    return Difference(mean=mean, low=mean - half, high=mean + half, p=p, n=3, error=error, df=16)


class TestConjunction:
    """Lower than all rivals takes plain alpha for each; any other verdict takes Holm's steps."""

    def test_all_at_plain_alpha_confirm_it(self):
        found = with_holm({name: difference(-0.1, p=0.04) for name in "abc"})
        assert min(each.holm for each in found.values()) > 0.05
        assert set(verdicts(found).values()) == {CONFIRMED}
        assert [each.visible for each in found.values()] == [visible(found["a"])] * 3

    def test_one_that_fails_leaves_the_others_to_holm(self):
        found = with_holm({
            "a": difference(-0.1, p=0.04), "b": difference(-0.1, p=0.6, sd=0.1),
            "c": difference(-0.1, p=0.001),
        })  # fmt: skip
        assert verdicts(found) == {"a": UNDECIDED, "b": UNDECIDED, "c": CONFIRMED}

    def test_a_refutation_takes_holm(self):
        one = {"a": difference(0.1, p=0.04), "b": difference(-0.1, p=0.6, sd=0.1)}
        assert verdicts(with_holm(one))["a"] == UNDECIDED
        assert verdicts(with_holm({"a": one["a"]}))["a"] == REFUTED


class TestLevel:
    def test_against_scipys_one_sided_tests(self):
        one, other = [4.0, 4.011, 3.994], [4.003, 3.998, 4.008]
        found = Spread.of({"a": one, "b": other}).difference("a", "b")
        sides = [
            stats.ttest_ind(np.add(one, shift), other, alternative=way).pvalue
            for shift, way in ((0.03, "greater"), (-0.03, "less"))
        ]
        assert level(found) == pytest.approx(max(sides))

    def test_less_is_more_than_level(self):
        """A detected difference is reported, even within the margin."""
        near = with_holm({"a": difference(-0.005, p=0.01, sd=0.002)})
        assert verdicts(near, margin=0.03) == {"a": CONFIRMED}
        unseen = with_holm({"a": difference(-0.005, p=0.3, sd=0.005)})
        assert verdicts(unseen, margin=0.03) == {"a": LEVEL}
        assert verdicts(unseen) == {"a": UNDECIDED}

    def test_two_seeds_are_not_level_however_alike(self):
        found = with_holm({"a": replace(difference(-0.005, p=0.3, sd=0.005), n=2)})
        assert verdicts(found, margin=0.03) == {"a": UNDECIDED}


class TestVerdictOfAClaim:
    @pytest.mark.parametrize(
        ("parts", "whole"),
        [
            ([CONFIRMED, CONFIRMED], CONFIRMED),
            ([CONFIRMED, UNDECIDED], UNDECIDED),
            ([CONFIRMED, REFUTED, UNDECIDED], REFUTED),
            ([CONFIRMED, LEVEL], LEVEL),
            ([LEVEL, UNDECIDED], UNDECIDED),
            ([], UNDECIDED),
        ],
    )
    def test_every_comparison_must_hold(self, parts: list[str], whole: str):
        assert verdict_of_all(parts) == whole


class TestCostToReach:
    @pytest.mark.parametrize(
        ("losses", "target", "cost"),
        [
            ([6.0, 5.0, 4.0], 4.5, 3.0), ([6.0, 5.0, 4.0], 5.0, 2.0), ([6, 5.0, 4], 3.9, math.inf),
            ([3.0, 2.0, 2], 4.0, 1), ([6, 4, 6], 5.0, 1.5), ([math.inf, 4.0, 3.0], 3.5, 3),
        ],
    )  # fmt: skip
    def test_by_hand(self, losses: list[float], target: float, cost: float):
        """Reached between points, at one, never, at once, a first time, after a diverged one."""
        assert cost_to_reach([1, 2, 4], losses, target) == cost


class TestSum:
    def test_against_welchs_test(self):
        rng = np.random.default_rng(5)
        seeds, rounds = rng.normal(-0.2, 0.05, 3), rng.normal(0.1, 0.2, 8)
        found = plus(_difference(seeds), _difference(rounds))
        test = stats.ttest_ind(seeds, -rounds, equal_var=False)
        assert (found.mean, found.p, found.n) == (
            pytest.approx(seeds.mean() + rounds.mean()),
            pytest.approx(test.pvalue),
            3,
        )
        assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))


def _difference(values: np.ndarray) -> Difference:
    return paired(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ([5, 4, 3], [4, 3.5, 3.5], [3.0]),
        ([5, 4, 3.5], [4, 3, 3], []),
        ([math.inf, 3.5, 3.4], [4, 3.6, 3.5], []),
        ([math.nan, 3.5, 3.4], [4, 3.4, 3.5], [3.0]),
    ],
)
def test_crossings(one: list[float], other: list[float], found: list[float]):
    assert crossings(one, other, [1, 2, 4]) == pytest.approx(found)
    assert crossings(other, one, [1, 2, 4]) == pytest.approx(found)
