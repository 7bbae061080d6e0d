"""The claims that a study tests, the comparisons that decide them, and their verdicts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatron_smlp.study.looks import Look, look, looks
from megatron_smlp.study.measured import Measured
from megatron_smlp.study.metrics import SUFFIX_LOSS, VALIDATION_LOSS
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

SECONDS, TOKENS, STEP_TIME = "seconds", "tokens", "step time"
Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A system, usually the study's subject, against another one."""

    system: str
    rival: str
    what: str
    """loss, loss behind the prefix, wrong answers in %, seconds, tokens, step time."""
    difference: Difference
    """A difference in nats for losses and in percent for answers; else a ratio, where 1 means no
    difference."""
    verdict: str
    is_bound: bool = False
    """Whether the first one's cost may be even lower, because a seed is at the target at its first
    horizon, or at one after a horizon that diverged. The interval's lower end is then 0."""
    unreached: int = 0
    """Seeds of the first that never reach the target, each of which makes the mean infinite."""

    @property
    def is_ratio(self) -> bool:
        return not self.what.startswith(("loss", "wrong"))


@dataclass(frozen=True, kw_only=True)
class Claim:
    name: str
    text: str
    comparisons: tuple[Comparison, ...]
    verdict: str
    notes: tuple[str, ...] = ()


def claims_of(measured: Measured) -> list[Claim]:
    """Return every claim that the study's systems can decide, with comparisons and verdict."""
    study, systems = measured.study, measured.systems
    parts = [pair for pair in study.ablations if _is_of_a_part(measured, pair)]
    asked = {
        pair[1]
        for pair in study.ablations
        if pair[0] == study.subject
        and (pair in parts or not (study.paper and systems[pair[0]].is_smlp))
    }
    claims = []
    # Otherwise C5, or the other comparisons if the subject is no sMLP, ask the same.
    if not {*measured.rivals()} <= asked:
        claims.append(_lower_loss(measured))
    if study.paper and any(system.is_sparse_transformer for system in systems.values()):
        claims += [_less_time(measured), _faster_steps(measured), _better_at_tasks(measured)]
    if parts:
        text = "each part helps: the first of each pair has a lower loss than the second"
        claims.append(_claim_of_losses(measured, parts, name="C5", text=text))
    return claims


def others_of(measured: Measured) -> Claim:
    """Return the study's pairs that belong to no claim, with a verdict on each and none overall."""
    pairs = [pair for pair in measured.study.ablations if not _is_of_a_part(measured, pair)]
    claim = _claim_of_losses(measured, pairs, name="other", text="", is_conjunction=False)
    return replace(claim, verdict="")


def _is_of_a_part(measured: Measured, pair: Pair) -> bool:
    """Return whether the second system is the first one without a MoE, which the paper makes a
    claim about: sMLP without any MoE is gMLP."""
    system, rival = (measured.systems[name] for name in pair)
    is_gated = rival.flags.get("architecture") in ("smlp", "gmlp")
    return measured.study.paper and system.is_smlp and is_gated and rival.moes < system.moes


def _lower_loss(measured: Measured) -> Claim:
    study, others = measured.study, measured.rivals()
    rest = " that is not an sMLP" if len(others) < len(measured.systems) - 1 else ""
    pairs = [(study.subject, name) for name in others]
    return _claim_of_losses(
        measured, pairs, name="C1" if study.paper else "lowest",
        text=f"{measured.systems[study.subject].title} has a lower loss than every other system"
        f"{rest} at equal tokens and FLOPs",
    )  # fmt: skip


def _claim_of_losses(
    measured: Measured, pairs: Iterable[Pair], *, name: str, text: str, is_conjunction: bool = True
) -> Claim:
    names = {VALIDATION_LOSS: "loss", SUFFIX_LOSS: "loss behind the prefix"}
    differences = {}
    for pair in pairs:
        field = measured.field(*pair)
        differences[pair] = (names[field], measured.at_end(field).difference(*pair))
    return _claim(
        differences, null=0.0, name=name, text=text, is_conjunction=is_conjunction, margin=MARGIN,
        notes=measured.gaps(name for pair in differences for name in pair),
    )  # fmt: skip


def _claim(
    differences: Mapping[Pair, tuple[str, Difference]],
    *,
    null: float,
    name: str,
    text: str,
    notes: Iterable[str],
    is_conjunction: bool = True,
    margin: float = 0.0,
) -> Claim:
    """Make a claim from comparisons in which less is better."""
    adjusted = with_holm(
        {pair: difference for pair, (_, difference) in differences.items()},
        is_conjunction=is_conjunction,
    )
    said = verdicts(adjusted, null=null, is_conjunction=is_conjunction, margin=margin)
    comparisons = tuple(
        Comparison(system=system, rival=rival, what=what, difference=adjusted[system, rival],
                   verdict=said[system, rival])
        for (system, rival), (what, _) in differences.items()
    )  # fmt: skip
    whole = verdict_of_all([comparison.verdict for comparison in comparisons])
    return Claim(name=name, text=text, comparisons=comparisons, verdict=whole, notes=tuple(notes))


def _best_moe(measured: Measured) -> str | None:
    """Return the sparse Transformer with the lowest mean loss at the longest horizon, among those
    with the most seeds: another one's single seed may be its luckiest."""
    at_end = measured.at_end(VALIDATION_LOSS)
    names = [name for name, system in measured.systems.items() if system.is_sparse_transformer]
    means = {name: mean for name in names if (mean := at_end.mean(name)).n}
    most = max((mean.n for mean in means.values()), default=0)
    whole = [name for name, mean in means.items() if mean.n == most]
    return min(whole, default=None, key=lambda name: means[name].mean)


def _less_time(measured: Measured) -> Claim:
    """Make claim C2: the time to the final loss of the best sparse Transformer, or else tokens."""
    text = "less wall-clock to the loss at which the best sparse Transformer ends (paper: half)"
    best = _best_moe(measured)
    if best is None:
        return Claim(
            name="C2", text=text, comparisons=(), verdict=UNDECIDED,
            notes=("no sparse Transformer has come to the longest horizon",),
        )  # fmt: skip
    pair = (measured.study.subject, best)
    # Another one may turn out to be the best when its last seeds have ended.
    late = [
        name
        for name, system in measured.systems.items()
        if system.is_sparse_transformer and measured.lacking(name)
    ]
    notes = [
        "the best sparse Transformer, by mean loss of those with the most seeds, is "
        f"{measured.systems[best].title}",
        *measured.gaps({*pair, *late}),
    ]
    unit = SECONDS if measured.tables.has_speed(*pair) else TOKENS
    if unit == TOKENS:
        notes.append("no quiet timing: tools/study.py run --speed; tokens say nothing of time")
    ratio = cost_ratio(measured, pair, unit=unit)
    if ratio.is_bound:
        notes.append("a seed is there at its first finite horizon, so the ratio is at most this")
    claim = _claim({pair: (unit, ratio.difference)}, null=1.0, name="C2", text=text, notes=notes)
    [decided] = claim.comparisons
    return replace(
        claim,
        comparisons=(replace(ratio, difference=decided.difference, verdict=decided.verdict),),
        verdict=claim.verdict if unit == SECONDS and not late else UNDECIDED,
    )


def cost_ratio(measured: Measured, pair: Pair, *, unit: str) -> Comparison:
    """Return the first system's cost over the second's, to the final loss of the second's same
    seed, without a verdict.

    Its logarithm is that of the token ratio, over seeds, plus for seconds that of the step-time
    ratio, over rounds of the timing. A seed of the first system that never reaches the target costs
    an infinite amount. One that has not come to the longest horizon is left out even if it has
    reached the target: it would count as fast, while slower unfinished ones would not count at all.
    If a seed is at the target at its first horizon, or at one after a horizon that diverged, the
    ratio is an upper bound. It can then confirm a claim but not refute one: its interval begins at
    0, and p is 1 if the interval contains 1.
    """
    system, rival = pair
    end = measured.tables.tokens(measured.study.longest)
    reached, is_bound = {}, False
    sides = [measured.curves(name, measured.field(*pair)) for name in pair]
    for seed in sides[0].keys() & sides[1].keys():
        (tokens, losses), (until, ends) = (side[seed] for side in sides)
        target = ends[-1] if until and until[-1] == end else math.nan
        if math.isfinite(target) and end in tokens:
            reached[seed] = cost_to_reach(tokens, losses, target)
            is_bound |= is_upper_bound(losses, target)
    ratio_of = log_ratio(reached, dict.fromkeys(reached, end))
    if unit == SECONDS:
        ratio_of = plus(ratio_of, _log_step_ratio(measured, *pair))
    ratio = exponential(ratio_of)
    if is_bound:
        ratio = replace(ratio, low=0.0, p=1.0 if ratio.high >= 1 else ratio.p)
    return Comparison(
        system=system, rival=rival, what=unit, verdict="", difference=ratio, is_bound=is_bound,
        unreached=sum(map(math.isinf, reached.values())),
    )  # fmt: skip


def _log_step_ratio(measured: Measured, system: str, rival: str) -> Difference:
    return log_ratio(measured.tables.step_seconds(system), measured.tables.step_seconds(rival))


def times_to_losses(measured: Measured) -> list[Comparison]:
    """Return the subject's cost over each rival's, to the rival's final loss."""
    study, tables = measured.study, measured.tables
    unit = SECONDS if tables.has_speed(*measured.systems) else TOKENS
    return [
        cost_ratio(measured, (study.subject, name), unit=unit)
        for name in measured.rivals()
        if tables.losses(name, study.longest, VALIDATION_LOSS)
    ]


def _better_at_tasks(measured: Measured) -> Claim:
    """Make claim C4: the percentage of wrong answers, averaged over the tasks that both have.

    All seeds are asked the same questions, so the interval also covers the choice of questions.
    """
    subject, systems = measured.study.subject, measured.systems
    others = [name for name in measured.rivals() if systems[name].is_sparse_transformer]
    tasks = measured.tables.labels(TASK)
    # Rivals that were not scored are compared too: whether it is above them is unknown.
    differences = {
        (subject, name): ("wrong answers in %", _fewer_wrong(measured, subject, name))
        for name in others
        if tasks
    }
    notes = [f"of {', '.join(tasks)}" if tasks else "no task was scored: study.py evaluate"]
    return _claim(
        differences, null=0.0, name="C4", notes=notes,
        text="zero-shot, as a mean over tasks, above every sparse Transformer",
    )  # fmt: skip


def _fewer_wrong(measured: Measured, system: str, rival: str) -> Difference:
    tables = measured.tables
    tasks = tables.common_tasks(system, rival)
    shares = {name: list(tables.wrong_answers(name, tasks).values()) for name in (system, rival)}
    difference = Spread.of(shares).difference(system, rival)
    return with_error(difference, tables.questions_error(tasks, system, rival))


def _faster_steps(measured: Measured) -> Claim:
    subject = measured.study.subject
    is_timed = measured.tables.has_speed(subject)
    # Rivals that were not timed are compared too: whether they are slower is unknown.
    ratios = {
        (subject, name): (STEP_TIME, exponential(_log_step_ratio(measured, subject, name)))
        for name in measured.rivals()
        if is_timed and measured.systems[name].is_sparse
    }
    notes = () if ratios else ("no quiet timing: tools/study.py run --speed",)
    text = "the most words a second of all sparse systems"
    return _claim(ratios, null=1.0, name="C3", text=text, notes=notes)


def primary_looks(measured: Measured) -> list[Look]:
    """Return the looks at the study's primary comparison, if it has one; a design gets one look,
    when it is complete."""
    study = measured.study
    if study.primary is None:
        return []
    field = measured.field(*study.primary)
    if study.design is None:
        return looks(*(_in_order(measured, name, field) for name in study.primary))
    difference = measured.at_end(field).difference(*study.primary)
    is_whole = not any(map(measured.lacking, study.primary))
    return [look(difference, alpha=ALPHA, spent=ALPHA)] if is_whole else []


def _in_order(measured: Measured, name: str, field: str) -> list[float]:
    """Return the losses of a system's seeds in order, stopping at the first that is missing."""
    losses = measured.tables.losses(name, measured.study.longest, field)
    there = itertools.takewhile(losses.__contains__, measured.study.seeds_of(name))
    return [losses[seed] for seed in there]
