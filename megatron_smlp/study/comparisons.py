"""What a report says of comparisons: their table, the deviations, the primary one's looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_smlp.study.cells import number, row, table, visible
from megatron_smlp.study.looks import LOOKS, Look
from megatron_smlp.study.metrics import SUFFIX_LOSS
from megatron_smlp.study.numbers import numbers
from megatron_smlp.study.rates import Rates
from megatron_smlp.study.spread import Spread
from megatron_smlp.study.statistics import UNDECIDED, level, why_undecided
from megatron_smlp.study.study_file import Study
from megatron_smlp.study.systems import System
from megatron_smlp.study.tables import Tables
from megatron_smlp.study.verdicts import SECONDS, TOKENS, Claim, Comparison, loss_field


def comparison_lines(
    study: Study, systems: Mapping[str, System], claims: Sequence[Claim]
) -> Iterator[str]:
    """Yield all comparisons, and why each that is undecided is."""
    yield from table(
        "claim", "of", "difference or ratio", "95 % interval", "df", "p", "p (Holm)",
        "p (level)", "runs" if study.design else "seeds", "standard error",
        "can be seen", "verdict",
    )  # fmt: skip
    for claim in claims:
        for each in claim.comparisons:
            found = each.found
            sign = "/" if each.is_ratio else "-"
            yield row(
                claim.name, f"{each.what}: {f' {sign} '.join(titles(systems, each))}",
                number(found.mean), f"{number(found.low)} to {number(found.high)}",
                number(found.df), f"{found.p:.3g}", f"{found.holm:.3g}",
                f"{level(found):.3g}" if each.what.startswith("loss") else "",
                found.n, number(found.error),
                f"{'a factor of ' if each.is_ratio else ''}{visible(each)}", each.verdict,
            )  # fmt: skip
    undecided = [
        (claim, each) for claim in claims for each in claim.comparisons if each.verdict == UNDECIDED
    ]
    yield from [""] * bool(undecided)
    for claim, each in undecided:
        pair = (" / " if each.is_ratio else " - ").join(titles(systems, each))
        is_fitted = study.design is not None and each.what in (SECONDS, TOKENS)
        why = (
            "costs of fitted curves have no interval"
            if is_fitted
            else why_undecided(each.found, null=float(each.is_ratio))
        )
        yield f"* {claim.name}, {each.what}: {pair} is undecided: {why}."


def deviation_lines(study: Study, systems: Mapping[str, System], tables: Tables) -> Iterator[str]:
    """Yield by which deviation losses are compared."""
    fields = dict.fromkeys(loss_field(system) for system in systems.values())
    for field in fields:
        found = numbers(study, systems, tables, horizon=study.longest, field=field)
        behind = " behind the prefix" * (field == SUFFIX_LOSS)
        if isinstance(found, Rates):
            yield from ("", _fit(systems, found, behind))
        elif found.df:
            yield from ("", _pool(systems, found, behind))


def _pool(systems: Mapping[str, System], found: Spread, behind: str) -> str:
    several = len(found.pooled) + len(found.outliers)
    test = f"; equal deviations of all {several}: Bartlett's p = {found.p:.3g}"
    names = ", ".join(systems[name].title for name in found.outliers)
    return (
        f"Losses{behind} are compared by seeds that are not paired, with one deviation of "
        f"{len(found.pooled)} systems, {found.sd:.4f} nats (df {found.df})"
        + test * (several > 1)
        + f". Outliers, with their own deviation and Welch's df: {names}" * bool(names)
        + "."
    )


def _fit(systems: Mapping[str, System], found: Rates, behind: str) -> str:
    names = ", ".join(systems[name].title for name in found.outside)
    return (
        f"Losses{behind} are minima of parabolas in log2(rate), one seed a rate, of "
        f"{found.curvature:.4f} nats per octave squared for all systems; runs deviate from "
        f"them by {number(found.sd)} nats (df {found.df})."
        + bool(names)
        * f" **Outside of its rates lies the fitted best of: {names}**."
    )


def primary_lines(
    study: Study, systems: Mapping[str, System], looks: Sequence[Look]
) -> Iterator[str]:
    """Yield the looks at the primary comparison, if there is one."""
    if study.primary is None:
        return
    pair = " - ".join(systems[name].title for name in study.primary)
    yield from ("", "## Primary comparison", "")
    which = "once, whole" if study.design else f"at {', '.join(map(str, LOOKS))} seeds"
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


def titles(systems: Mapping[str, System], each: Comparison) -> tuple[str, str]:
    return systems[each.one].title, systems[each.other].title
