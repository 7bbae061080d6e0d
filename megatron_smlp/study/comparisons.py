"""What a report says of verdicts: claims, their comparisons, deviations, and the primary looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_smlp.study.cells import number, row, table, visible
from megatron_smlp.study.looks import LOOKS, Look
from megatron_smlp.study.measured import Measured
from megatron_smlp.study.metrics import SUFFIX_LOSS
from megatron_smlp.study.rates import Rates
from megatron_smlp.study.statistics import CONFIRMED, REFUTED, UNDECIDED, level, why_undecided
from megatron_smlp.study.verdicts import SECONDS, TOKENS, Claim, Comparison


def claim_lines(measured: Measured, claims: Sequence[Claim]) -> Iterator[str]:
    """Yield the verdict on each claim, and of which comparisons it is made."""
    if not claims:
        yield "None of the paper's is tested." if measured.study.paper else "None is tested."
        return
    yield from table("claim", "says", "verdict", "because")
    for claim in claims:
        because = "; ".join([*_because(measured, claim), *claim.notes]) or "not planned"
        yield row(claim.name, claim.text, f"**{claim.verdict}**", because)


def _because(measured: Measured, claim: Claim) -> Iterator[str]:
    is_one_against_all = len({each.one for each in claim.comparisons}) == 1
    for said in (CONFIRMED, REFUTED, UNDECIDED):
        pairs = [_titles(measured, each) for each in claim.comparisons if each.verdict == said]
        if pairs and is_one_against_all:
            yield f"{said} against {', '.join(other for _, other in pairs)}"
        elif pairs:
            yield f"{said}: {', '.join(map(' against '.join, pairs))}"


def comparison_lines(measured: Measured, claims: Sequence[Claim]) -> Iterator[str]:
    """Yield all comparisons, and why each that is undecided is."""
    is_design = measured.study.design is not None
    yield from table(
        "claim", "of", "difference or ratio", "95 % interval", "df", "p", "p (Holm)",
        "p (level)", "runs" if is_design else "seeds", "standard error", "can be seen", "verdict",
    )  # fmt: skip
    undecided = []
    for claim in claims:
        for each in claim.comparisons:
            found, (one, other) = each.found, _titles(measured, each)
            of = f"{each.what}: {one} {'/' if each.is_ratio else '-'} {other}"
            yield row(
                claim.name, of, number(found.mean), f"{number(found.low)} to {number(found.high)}",
                number(found.df), f"{found.p:.3g}", f"{found.holm:.3g}",
                f"{level(found):.3g}" if each.what.startswith("loss") else "",
                found.n, number(found.error),
                f"{'a factor of ' if each.is_ratio else ''}{visible(each)}", each.verdict,
            )  # fmt: skip
            if each.verdict == UNDECIDED:
                why = (
                    "costs of fitted curves have no interval"
                    if is_design and each.what in (SECONDS, TOKENS)
                    else why_undecided(found, null=float(each.is_ratio))
                )
                undecided.append(f"* {claim.name}, {of} is undecided: {why}.")
    yield from ["", *undecided] if undecided else []


def other_lines(measured: Measured, others: Claim) -> Iterator[str]:
    """Yield the comparisons of no claim."""
    if not others.comparisons:
        return
    pairs = "of no claim of the paper" if measured.study.paper else "that the study names"
    yield from ("", "## Other comparisons", "")
    yield (
        f"Pairs {pairs}, by p after Holm over these alone. Confirmed: the first of the pair has "
        "the lower loss; refuted: the second has.\n"
    )
    yield from comparison_lines(measured, [others])
    yield from (f"\n{note}." for note in others.notes)


def deviation_lines(measured: Measured) -> Iterator[str]:
    """Yield by which deviation losses are compared."""
    for field in dict.fromkeys(map(measured.field, measured.systems)):
        found = measured.at_end(field)
        behind = " behind the prefix" * (field == SUFFIX_LOSS)
        apart = found.outside if isinstance(found, Rates) else found.outliers
        names = ", ".join(measured.systems[name].title for name in apart)
        if isinstance(found, Rates):
            yield (
                f"\nLosses{behind} are minima of parabolas in log2(rate), one seed a rate, of "
                f"{found.curvature:.4f} nats per octave squared for all systems; runs deviate from "
                f"them by {number(found.sd)} nats (df {found.df}); equal deviations of all "
                f"{len(found.points)}: Bartlett's p = {found.p:.3g}."
                + f" **Outside of its rates lies the fitted best of: {names}**."
                * bool(names)
            )
        elif found.df:
            several = len(found.pooled) + len(found.outliers)
            test = f"; equal deviations of all {several}: Bartlett's p = {found.p:.3g}"
            yield (
                f"\nLosses{behind} are compared by seeds that are not paired, with one deviation "
                f"of {len(found.pooled)} systems, {found.sd:.4f} nats (df {found.df})"
                + test * (several > 1)
                + f". Outliers, with their own deviation and Welch's df: {names}" * bool(names)
                + "."
            )


def primary_lines(measured: Measured, looks: Sequence[Look]) -> Iterator[str]:
    """Yield the looks at the primary comparison, if there is one."""
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
    for each in looks:
        found = each.found
        yield row(
            found.n, f"{each.alpha:.4f}", f"{each.spent:.4f}", number(found.mean),
            f"{number(found.low)} to {number(found.high)}", number(found.df), f"{found.p:.3g}",
            f"**{each.verdict}**",
        )  # fmt: skip
    if not looks:
        yield "\nThe first look is not due yet."


def _titles(measured: Measured, each: Comparison) -> tuple[str, str]:
    return measured.systems[each.one].title, measured.systems[each.other].title
