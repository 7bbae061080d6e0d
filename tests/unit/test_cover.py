"""The parts of matrices that `make test` runs: no pair that matters is only in the slow rest."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from support.cover import cover, pairs

AXES = ("a", "b", "c")
PAIRS = tuple(itertools.combinations(AXES, 2))


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=40, unique=True))
def test_every_pair_of_the_matrix_is_in_the_cover(cases: list[tuple[int, ...]]):
    def facets(case: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(AXES, case, strict=True))

    def all_pairs(some: list[tuple[int, ...]]) -> set[tuple[object, ...]]:
        return {pair for case in some for pair in pairs(facets(case), PAIRS)}

    chosen = cover(cases, facets, PAIRS)
    assert set(chosen) <= set(cases)
    assert all_pairs(chosen) == all_pairs(cases)


def test_a_full_matrix_shrinks():
    cases = list(itertools.product(range(3), repeat=3))
    chosen = cover(cases, lambda case: dict(zip(AXES, case, strict=True)), PAIRS)
    assert 9 <= len(chosen) <= 12
