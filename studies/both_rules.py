#!/usr/bin/env python3
"""Print which verdicts of the kept studies differ from those by the rule they were planned with.

    .venv/bin/python studies/both_rules.py

Then: losses paired by seed, and Holm's steps over a claim for confirmations too. Now: decision 82.
The output, made from the CSV files in studies/results, is kept in studies/results/both-rules.md.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_smlp.study.cells import number, row, table  # noqa: E402
from megatron_smlp.study.cli import build_parser, read_states  # noqa: E402
from megatron_smlp.study.report import Page  # noqa: E402
from megatron_smlp.study.statistics import (  # noqa: E402
    UNDECIDED,
    Difference,
    paired,
    verdict,
    verdict_of_all,
    with_holm,
)
from megatron_smlp.study.verdicts import Claim, Comparison  # noqa: E402

STUDIES = ("micro", "controls", "long", "heads", "cpu", "mixers")
PAIRS = "pair"
"""Name for the pairs that belong to no claim."""


def pages() -> Iterator[Page]:
    """Yield the report of each study that was planned by the earlier rule."""
    for name in STUDIES:
        [folder] = (REPOSITORY / "studies" / "results" / name).iterdir()
        file, none = REPOSITORY / "studies" / f"{name}.yaml", str(folder / "none")
        argv = ["report", str(file), "--results", str(folder), "--runs", none, "--data", none]
        [(known, results)] = read_states(build_parser().parse_args(argv))
        yield Page(known, results)


def by_pairs(page: Page, claim: Claim) -> list[tuple[Comparison, Difference, str]]:
    """Return a claim's comparisons of losses with the earlier rule's verdicts."""
    study, tables = page.study, page.measured.tables
    compared = [
        comparison for comparison in claim.comparisons if comparison.what.startswith("loss")
    ]
    differences = {}
    for place, comparison in enumerate(compared):
        field = page.measured.field(comparison.system, comparison.rival)
        sides = (
            tables.losses(name, study.longest, field)
            for name in (comparison.system, comparison.rival)
        )
        differences[place] = paired(*sides)
    adjusted = with_holm(differences, is_conjunction=False).values() if differences else ()
    return [
        (comparison, then, verdict(replace(then, p=then.holm)))
        for comparison, then in zip(compared, adjusted, strict=True)
    ]


def lines() -> Iterator[str]:
    """Yield the lines of the page: comparisons, then whole claims."""
    comparisons, claims, alike = [], [], 0
    for page in pages():
        for claim in (*page.claims, replace(page.others, name=PAIRS)):
            both = by_pairs(page, claim)
            for comparison, then, said in both:
                alike += said == comparison.verdict
                if said != comparison.verdict:
                    comparisons.append(row(
                        f"`{page.study.name}`",
                        f"{claim.name}: {comparison.system} - {comparison.rival}",
                        number(comparison.difference.mean, ".3f"), _cells(then), said,
                        _cells(comparison.difference), f"**{comparison.verdict}**",
                    ))  # fmt: skip
            before = verdict_of_all([said for *_, said in both]) if both else UNDECIDED
            if claim.name != PAIRS and both and before != claim.verdict:
                claims.append(row(f"`{page.study.name}`", claim.name, before,
                                  f"**{claim.verdict}**"))  # fmt: skip
    yield "# Verdicts that changed with the rule\n"
    yield from table("study", "comparison", "difference", "paired: 95 % interval, p after Holm",
                     "verdict", "now: 95 % interval, p after Holm", "verdict")  # fmt: skip
    yield from comparisons
    yield f"\nThe other {alike} comparisons of losses end as before. Claims that do not:\n"
    yield from table("study", "claim", "paired", "now")
    yield from claims


def _cells(gap: Difference) -> str:
    return f"{number(gap.low, '.3f')} to {number(gap.high, '.3f')}, {gap.holm:.2g}"


if __name__ == "__main__":
    print(*lines(), sep="\n")
