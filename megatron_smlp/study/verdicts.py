"""The claims that a study tests, each by comparisons of systems, and how each of them ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatron_smlp.study.looks import Look, look, looks
from megatron_smlp.study.metrics import SUFFIX_LOSS, VALIDATION_LOSS
from megatron_smlp.study.numbers import curves, numbers
from megatron_smlp.study.results import TASK
from megatron_smlp.study.spread import Spread
from megatron_smlp.study.statistics import (
    ALPHA,
    MARGIN,
    UNDECIDED,
    Difference,
    cost_to_reach,
    exponential,
    is_upper_bound,
    log_ratio,
    plus,
    verdict_of_all,
    verdicts,
    with_error,
    with_holm,
)
from megatron_smlp.study.study_file import Study
from megatron_smlp.study.systems import System
from megatron_smlp.study.tables import Tables

SECONDS, TOKENS = "seconds", "tokens"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A system, mostly the study's subject, against another one."""

    one: str
    other: str
    what: str
    """loss, loss behind the prefix, wrong answers in %, seconds, tokens, step time."""
    found: Difference
    """Losses differ in nats and answers in percent; everything else is a ratio, where 1 is no
    difference."""
    verdict: str
    is_bound: bool = False
    """Whether the first one's cost may be even lower: a seed is at the target at its first horizon,
    or at the one behind a horizon that diverged. The interval's lower end is then 0."""
    unreached: int = 0
    """Seeds of the first that never come to the target, each of which makes the mean infinite."""

    @property
    def is_ratio(self) -> bool:
        return not self.what.startswith(("loss", "wrong"))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim, of the paper or on a study's subject."""

    name: str
    text: str
    comparisons: tuple[Comparison, ...]
    verdict: str
    notes: tuple[str, ...] = ()


def claims_of(study: Study, systems: Mapping[str, System], tables: Tables) -> list[Claim]:
    """Return every claim that the study's systems can decide, with comparisons and verdict."""
    claims = []
    asked = [
        other
        for one, other in study.ablations
        if one == study.subject
        and (
            _is_of_a_part(study, systems, (one, other))
            or not (study.paper and systems[one].is_smlp)
        )
    ]
    # Else C5 asks the same, or of a subject that is no sMLP the other comparisons do.
    if not set(rivals(study, systems)) <= set(asked):
        claims.append(_lower_loss)
    if study.paper and any(system.kind == "moe" for system in systems.values()):
        claims += [_less_time, _faster_steps, _better_at_tasks]
    if any(_is_of_a_part(study, systems, pair) for pair in study.ablations):
        claims.append(_each_part_helps)
    return [claim(study, systems, tables) for claim in claims]


def others_of(study: Study, systems: Mapping[str, System], tables: Tables) -> Claim:
    """Return the study's pairs that are of no claim, with a verdict on each and none on all."""
    pairs = [pair for pair in study.ablations if not _is_of_a_part(study, systems, pair)]
    found = _claim_of_losses(
        study, systems, tables, pairs, name="other", text="", is_conjunction=False
    )
    return replace(found, verdict="")


def _is_of_a_part(study: Study, systems: Mapping[str, System], pair: tuple[str, str]) -> bool:
    """Return whether the second is the first without a MoE, which is a claim of the paper: sMLP
    without any is gMLP."""
    one, other = (systems[name] for name in pair)
    is_gated = other.flags.get("architecture") in ("smlp", "gmlp")
    return study.paper and one.is_smlp and is_gated and other.moes < one.moes


def _lower_loss(study: Study, systems: Mapping[str, System], tables: Tables) -> Claim:
    others = rivals(study, systems)
    rest = " that is not an sMLP" if len(others) < len(systems) - 1 else ""
    pairs = [(study.subject, name) for name in others]
    return _claim_of_losses(
        study, systems, tables, pairs, name="C1" if study.paper else "lowest",
        text=f"{systems[study.subject].title} has a lower loss than every other system{rest} at "
        "equal tokens and FLOPs",
    )  # fmt: skip


def _each_part_helps(study: Study, systems: Mapping[str, System], tables: Tables) -> Claim:
    pairs = [pair for pair in study.ablations if _is_of_a_part(study, systems, pair)]
    return _claim_of_losses(
        study, systems, tables, pairs, name="C5",
        text="each part helps: the first of each pair has a lower loss than the second",
    )  # fmt: skip


def rivals(study: Study, systems: Mapping[str, System]) -> list[str]:
    """Return the systems that the subject is compared with: all others, of which the paper's claims
    are about those that are not an sMLP."""
    return [
        name
        for name, system in systems.items()
        if name != study.subject and not (study.paper and system.is_smlp)
    ]


def _claim_of_losses(
    study: Study,
    systems: Mapping[str, System],
    tables: Tables,
    pairs: Iterable[tuple[str, str]],
    *,
    name: str,
    text: str,
    is_conjunction: bool = True,
) -> Claim:
    found: dict[tuple[str, str], tuple[str, Difference]] = {}
    for one, other in pairs:
        field = loss_field(systems[one], systems[other])
        at_end = numbers(study, systems, tables, horizon=study.longest, field=field)
        found[one, other] = (field, at_end.difference(one, other))
    names = {VALIDATION_LOSS: "loss", SUFFIX_LOSS: "loss behind the prefix"}
    return _claim(
        {pair: (names[field], difference) for pair, (field, difference) in found.items()},
        null=0.0, name=name, text=text, is_conjunction=is_conjunction, margin=MARGIN,
        notes=tables.gaps(study, [name for pair in found for name in pair]),
    )  # fmt: skip


def loss_field(*systems: System) -> str:
    """Return the loss that these are compared by: of what all of them are trained to predict."""
    behind = any(system.predicts_suffix for system in systems)
    return SUFFIX_LOSS if behind else VALIDATION_LOSS


def _claim(
    found: Mapping[tuple[str, str], tuple[str, Difference]],
    *,
    null: float,
    name: str,
    text: str,
    notes: tuple[str, ...] = (),
    is_conjunction: bool = True,
    margin: float = 0.0,
) -> Claim:
    """Make a claim of comparisons in which less is better."""
    adjusted = with_holm(
        {pair: each for pair, (_, each) in found.items()}, is_conjunction=is_conjunction
    )
    said = verdicts(adjusted, null=null, is_conjunction=is_conjunction, margin=margin)
    comparisons = tuple(
        Comparison(
            one=pair[0],
            other=pair[1],
            what=found[pair][0],
            found=difference,
            verdict=said[pair],
        )
        for pair, difference in adjusted.items()
    )
    whole = verdict_of_all([each.verdict for each in comparisons])
    return Claim(name=name, text=text, comparisons=comparisons, verdict=whole, notes=notes)


def _best_moe(study: Study, systems: Mapping[str, System], tables: Tables) -> str | None:
    """Return the sparse Transformer with the lowest mean loss at the longest horizon, of those with
    the most seeds: the one seed of another may be its luckiest."""
    at_end = numbers(study, systems, tables, horizon=study.longest, field=VALIDATION_LOSS)
    names = [name for name, system in systems.items() if system.kind == "moe"]
    found = {name: mean for name in names if (mean := at_end.mean(name)).n}
    most = max((mean.n for mean in found.values()), default=0)
    whole = [name for name, mean in found.items() if mean.n == most]
    return min(whole, default=None, key=lambda name: found[name].mean)


def _less_time(study: Study, systems: Mapping[str, System], tables: Tables) -> Claim:
    """C2: the time to the loss at which the best sparse Transformer ends; tokens for comparison."""
    text = "less wall-clock to the loss at which the best sparse Transformer ends (paper: half)"
    best = _best_moe(study, systems, tables)
    if best is None:
        return Claim(
            name="C2", text=text, comparisons=(), verdict=UNDECIDED,
            notes=("no sparse Transformer has come to the longest horizon",),
        )  # fmt: skip
    notes = [
        "the best sparse Transformer, by mean loss of those with the most seeds, is "
        f"{systems[best].title}",
        *tables.gaps(study, [study.subject, best]),
    ]
    unit = SECONDS
    if not tables.has_speed(study.subject, best):
        unit = TOKENS
        notes.append("no quiet timing: tools/study.py run --speed; tokens say nothing of time")
    ratio = cost_ratio(study, systems, tables, pair=(study.subject, best), unit=unit)
    if ratio.is_bound:
        notes.append("a seed is there at its first finite horizon, so the ratio is at most this")
    claim = _claim({(study.subject, best): (unit, ratio.found)}, null=1.0, name="C2", text=text)
    [decided] = claim.comparisons
    comparisons = (replace(ratio, found=decided.found, verdict=decided.verdict),)
    whole = claim.verdict if unit == SECONDS else UNDECIDED
    return Claim(name="C2", text=text, comparisons=comparisons, verdict=whole, notes=tuple(notes))


def cost_ratio(
    study: Study,
    systems: Mapping[str, System],
    tables: Tables,
    *,
    pair: tuple[str, str],
    unit: str,
) -> Comparison:
    """Return the first one's cost over the second's, to the loss at which the second's seed ends,
    without a verdict.

    Its logarithm is that of the tokens, over seeds, and for seconds that of the step times, over
    rounds of the timing. A seed of the first that never comes there costs an infinite amount. One
    that is not at the longest horizon yet is left out, also if it is there: it would count among
    the fast ones, and those that are still on their way nowhere.
    Where one is there at its first horizon, or the one behind one that diverged, the ratio is at
    most this, so that it can confirm a claim but not refute one: its interval begins at 0, and p is
    1 if it then holds 1.
    """
    one, other = pair
    field = loss_field(systems[one], systems[other])
    end = tables.tokens(study.longest)
    reached, is_bound = {}, False
    sides = [curves(study, systems, tables, name=name, field=field) for name in pair]
    for seed in sides[0].keys() & sides[1].keys():
        (tokens, losses), (until, ends) = (side[seed] for side in sides)
        target = ends[-1] if until and until[-1] == end else math.nan
        if math.isfinite(target) and end in tokens:
            reached[seed] = cost_to_reach(tokens, losses, target)
            is_bound |= is_upper_bound(losses, target)
    found = log_ratio(reached, dict.fromkeys(reached, end))
    if unit == SECONDS:
        found = plus(found, _log_step_ratio(tables, one, other))
    ratio = exponential(found)
    if is_bound:
        ratio = replace(ratio, low=0.0, p=1.0 if ratio.high >= 1 else ratio.p)
    return Comparison(
        one=one, other=other, what=unit, verdict="", found=ratio, is_bound=is_bound,
        unreached=sum(map(math.isinf, reached.values())),
    )  # fmt: skip


def _log_step_ratio(tables: Tables, one: str, other: str) -> Difference:
    return log_ratio(tables.step_seconds(one), tables.step_seconds(other))


def _better_at_tasks(study: Study, systems: Mapping[str, System], tables: Tables) -> Claim:
    """C4: the share of wrong answers, in percent, as a mean over the tasks that both have.

    Seeds are asked the same questions: the interval is also over which ones were asked.
    """
    others = [name for name in rivals(study, systems) if systems[name].is_sparse]
    tasks = tables.labels(TASK)
    # A rival that was not scored is compared as well: above it, nothing is known.
    found = {
        (study.subject, name): ("wrong answers in %", _fewer_wrong(tables, study.subject, name))
        for name in others
        if tasks
    }
    notes = (
        (f"of {', '.join(tasks)}", *tables.unscored(study, [study.subject, *others]))
        if tasks
        else ("no task was scored: study.py evaluate",)
    )
    return _claim(
        found, null=0.0, name="C4", notes=notes,
        text="zero-shot, as a mean over tasks, above every sparse Transformer",
    )  # fmt: skip


def _fewer_wrong(tables: Tables, one: str, other: str) -> Difference:
    tasks = tables.common_tasks(one, other)
    shares = {name: list(tables.wrong_answers(name, tasks).values()) for name in (one, other)}
    found = Spread.of(shares).difference(one, other)
    return with_error(found, tables.questions_error(tasks, one, other))


def _faster_steps(study: Study, systems: Mapping[str, System], tables: Tables) -> Claim:
    text = "the most words a second of all sparse systems"
    others = [name for name in rivals(study, systems) if systems[name].is_sparse]
    found = {
        (study.subject, name): (
            "step time",
            exponential(_log_step_ratio(tables, study.subject, name)),
        )
        for name in others
        if tables.has_speed(study.subject, name)
    }
    notes = () if found else ("no quiet timing: tools/study.py run --speed",)
    return _claim(found, null=1.0, name="C3", text=text, notes=notes)


def primary_looks(study: Study, systems: Mapping[str, System], tables: Tables) -> list[Look]:
    """Return the looks at the study's primary comparison; a design is looked at once, whole."""
    assert study.primary is not None
    field = loss_field(*(systems[name] for name in study.primary))
    if study.design is None:
        return looks(*(_in_order(study, tables, name, field) for name in study.primary))
    at_end = numbers(study, systems, tables, horizon=study.longest, field=field)
    is_whole = not any(tables.lacking(study, name) for name in study.primary)
    found = at_end.difference(*study.primary)
    return [look(found, alpha=ALPHA, spent=ALPHA)] if is_whole else []


def _in_order(study: Study, tables: Tables, name: str, field: str) -> list[float]:
    """Return the losses of a system's seeds, to before the first that is missing."""
    losses = tables.losses(name, study.longest, field)
    there = itertools.takewhile(losses.__contains__, study.seeds_of(name))
    return [losses[seed] for seed in there]
