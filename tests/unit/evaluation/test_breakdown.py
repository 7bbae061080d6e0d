"""Loss by kind of token: each token is in one bin of each kind, as slow, plain definitions say."""

import itertools
import math

import numpy as np
import pytest

from megatron_smlp.evaluation.breakdown import LONGEST_REPEAT, Breakdown, frequency_bins, repeats
from megatron_smlp.evaluation.perplexity import windows
from megatron_smlp.evaluation.rows import RowScore


def slow_repeat(tokens: list[int], t: int) -> int:
    """Compute the longest repeat by comparing the ends of each two prefixes."""
    longest = 0
    for s in range(t):
        length = 0
        while length <= s and tokens[s - length] == tokens[t - length]:
            length += 1
        longest = max(longest, length)
    return min(longest, LONGEST_REPEAT)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 40])
def test_repeats_are_the_longest_common_runs(vocabulary: int):
    tokens = np.random.default_rng(vocabulary).integers(vocabulary, size=60)
    expected = [slow_repeat(tokens.tolist(), t) for t in range(60)]
    assert repeats(tokens).tolist() == expected


def test_frequencies_are_cut_in_equal_parts():
    counts = np.array([1, 50, 2, 25, 20, 2, 0])
    assert frequency_bins(counts, 2).tolist() == [1, 0, 1, 1, 1, 1, 1]
    even = frequency_bins(np.full(100, 3), 5)
    assert np.bincount(even).tolist() == [20] * 5


def test_every_kind_has_all_tokens_and_their_mean():
    draw = np.random.default_rng(0)
    text = draw.integers(9, size=205).tolist()
    counts = np.bincount(text, minlength=9)
    starts = np.array([0, 30, 31, 150, 205])
    breakdown = Breakdown(counts, starts)
    losses = []
    for window in windows(len(text), longest=16, stride=5):
        row = window.row(text)
        own = draw.gamma(2.0, size=row.scored)
        losses += own.tolist()
        breakdown.add(row, RowScore(tuple(-own), (False,) * row.scored), place=window.scored)
    assert len(losses) == len(text) - 1
    report = breakdown.report()
    positions = {each["label"]: each["tokens"] for each in report["position"]}
    # The first window scores all of its 16 positions, each later one its last 5, 11 to 15.
    assert [positions[label] for label in ("0", "1-2", "3-6")] == [1, 2, 4]
    assert set(report) == {"position", "frequency", "repeat", "document"}
    assert [each["tokens"] for each in report["document"]] == [29, 1, 119, 55]
    by_hand = [np.mean(losses[max(0, a - 1) : b - 1]) for a, b in itertools.pairwise(starts)]
    assert [each["loss"] for each in report["document"]] == pytest.approx(by_hand)
    for bins in report.values():
        assert sum(each["tokens"] for each in bins) == len(losses)
        total = math.fsum(each["tokens"] * each["loss"] for each in bins)
        assert total == pytest.approx(math.fsum(losses))
