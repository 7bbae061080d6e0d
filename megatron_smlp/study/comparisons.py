"""Report sections on verdicts: claims, their comparisons, deviations, and the primary looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_smlp.study.cells import listed, number, row, table, visible
from megatron_smlp.study.looks import LOOKS, Look
from megatron_smlp.study.measured import Measured
from megatron_smlp.study.metrics import SUFFIX_LOSS
from megatron_smlp.study.rates import Rates
from megatron_smlp.study.statistics import (
    CONFIRMED,
    LEVEL,
    REFUTED,
    UNDECIDED,
    level,
    why_undecided,
)
from megatron_smlp.study.verdicts import SECONDS, STEP_TIME, TOKENS, Claim, Comparison


def claim_lines(measured: Measured, claims: Sequence[Claim]) -> Iterator[str]:
    if not claims:
        yield "None of the paper's is tested." if measured.study.paper else "None is tested."
        return
    yield from table("claim", "says", "verdict", "because")
    for claim in claims:
        because = "; ".join([*_because(measured, claim), *claim.notes]) or "not planned"
        yield row(claim.name, claim.text, f"**{claim.verdict}**", because)


def _because(measured: Measured, claim: Claim) -> Iterator[str]:
    is_one_against_all = len({comparison.system for comparison in claim.comparisons}) == 1
    for said in (CONFIRMED, REFUTED, LEVEL, UNDECIDED):
        pairs = [
            _titles(measured, comparison)
            for comparison in claim.comparisons
            if comparison.verdict == said
        ]
        if pairs and is_one_against_all:
            yield f"{said} against {listed(other for _, other in pairs)}"
        elif pairs:
            yield f"{said}: {listed(map(' against '.join, pairs))}"


def comparison_lines(measured: Measured, claims: Sequence[Claim]) -> Iterator[str]:
    is_design = measured.study.design is not None
    reasons: list[str] = []
    yield from table(
        "claim", "of", "difference or ratio", "95 % interval", "df", "p", "p (Holm)",
        "p (level)", "n", "standard error (of a ratio: of its logarithm)", "can be seen", "verdict",
    )  # fmt: skip
    for claim in claims:
        undecided: dict[str, list[str]] = {}
        for comparison in claim.comparisons:
            difference, (system, rival) = comparison.difference, _titles(measured, comparison)
            of = f"{comparison.what}: {system} {'/' if comparison.is_ratio else '-'} {rival}"
            yield row(
                claim.name, of, number(difference.mean),
                f"{number(difference.low)} to {number(difference.high)}",
                number(difference.df), f"{difference.p:.3g}", f"{difference.holm:.3g}",
                f"{level(difference):.3g}" if comparison.what.startswith("loss") else "",
                difference.n, number(difference.error),
                f"{'a factor of ' if comparison.is_ratio else ''}{visible(comparison)}",
                comparison.verdict,
            )  # fmt: skip
            if comparison.verdict == UNDECIDED:
                why = (
                    "costs of fitted curves have no interval"
                    if is_design and comparison.what in (SECONDS, TOKENS)
                    else why_undecided(
                        difference,
                        null=float(comparison.is_ratio),
                        unit="rounds" if comparison.what == STEP_TIME else "seeds",
                    )
                )
                undecided.setdefault(why, []).append(of)
        for why, pairs in undecided.items():
            which = f": {'; '.join(pairs)}" * (len(undecided) > 1)
            reasons.append(f"* {claim.name} is undecided, {why}{which}.")
    yield from ("", *reasons) if reasons else ()


def other_lines(measured: Measured, others: Claim) -> Iterator[str]:
    if not others.comparisons:
        return
    pairs = "of no claim of the paper" if measured.study.paper else "that the study names"
    yield from ("", "## Other comparisons", "")
    yield (
        f"Pairs {pairs}, by p after Holm over these alone. Confirmed: the first of the pair has "
        "the lower loss; refuted: the second has.\n"
    )
    yield from comparison_lines(measured, [others])
    if others.notes:
        yield f"\n{'; '.join(others.notes)}."


def deviation_lines(measured: Measured) -> Iterator[str]:
    for field in dict.fromkeys(map(measured.field, measured.systems)):
        spread = measured.at_end(field)
        behind = " behind the prefix" * (field == SUFFIX_LOSS)
        apart = spread.at_edge if isinstance(spread, Rates) else spread.outliers
        names = listed(measured.systems[name].title for name in apart)
        if not spread.df:
            continue
        if isinstance(spread, Rates):
            yield (
                f"\nLosses{behind} are the lowest points of parabolas in log2(rate), within the "
                "rates trained, one seed a rate, of "
                f"{spread.curvature:.4f} nats per octave squared for all systems; runs deviate "
                f"from them by {number(spread.sd)} nats (df {spread.df}); equal deviations of all "
                f"{len(spread.points)}: Bartlett's p = {spread.p:.3g}."
                + f" At an edge of its rates lies the fitted best of: {names}."
                * bool(names)
            )
        else:
            several = len(spread.pooled) + len(spread.outliers)
            test = f"; equal deviations of all {several}: Bartlett's p = {spread.p:.3g}"
            shared = f"with one deviation of {len(spread.pooled)} systems, {spread.sd:.4f} nats"
            shared += f" (df {spread.df})"
            if several > len(spread.pooled) == 1:
                shared, names = "each system with its own deviation and Welch's df", ""
            yield (
                f"\nLosses{behind} are compared by seeds that are not paired, {shared}"
                + test * (several > 1)
                + f". Outliers, with their own deviation and Welch's df: {names}" * bool(names)
                + "."
            )


def primary_lines(measured: Measured, looks: Sequence[Look]) -> Iterator[str]:
    study = measured.study
    if study.primary is None:
        return
    pair = " - ".join(measured.systems[name].title for name in study.primary)
    which = "once, whole" if study.design else f"at {', '.join(map(str, LOOKS))} seeds"
    yield from ("", "## Primary comparison", "")
    yield (
        f"Named in the study's file: the final loss of {pair}, by a test of its own, looked "
        f"at {which}. The interval is as wide as the look's alpha asks, and holds over all "
        "looks.\n"
    )
    heads = ("runs" if study.design else "seeds", "alpha of this look", "alpha spent")
    yield from table(*heads, "difference", "interval", "df", "p", "verdict")
    for look in looks:
        difference = look.difference
        yield row(
            difference.n, f"{look.alpha:.4f}", f"{look.spent:.4f}", number(difference.mean),
            f"{number(difference.low)} to {number(difference.high)}", number(difference.df),
            f"{difference.p:.3g}", f"**{look.verdict}**",
        )  # fmt: skip
    if not looks:
        yield "\nThe first look is not due yet."


def _titles(measured: Measured, comparison: Comparison) -> tuple[str, str]:
    return measured.systems[comparison.system].title, measured.systems[comparison.rival].title
