"""Report sections on systems: sizes and speed, losses, times, crossings, final checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from megatron_smlp.evaluation.reports import PAPER_FIGURES, PAPER_METRICS
from megatron_smlp.study.cells import (
    deviation,
    listed,
    mean_of,
    not_reached,
    number,
    plain_mean,
    row,
    seeds,
    speedup,
    table,
)
from megatron_smlp.study.fairness import CONVENTIONS, convention_titles, flops_spread
from megatron_smlp.study.measured import Measured
from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.plan import Plan
from megatron_smlp.study.rates import Rates
from megatron_smlp.study.results import DOCUMENT, ROUTING, TASK
from megatron_smlp.study.state import DONE
from megatron_smlp.study.statistics import crossings, paired, with_error
from megatron_smlp.study.tables import QUIET
from megatron_smlp.study.verdicts import SECONDS, TOKENS, Comparison

BREAKDOWN = ("position", "frequency", "repeat")
CHANCE = {"copa": 50, "piqa": 50, "storycloze": 50, "winogrande": 50, "hellaswag": 25}


def system_lines(measured: Measured, plan: Plan) -> Iterator[str]:
    """Yield sizes, costs, rates and quiet speeds, and on which machines they were measured."""
    tables = measured.tables
    yield from table(
        "system", "parameters", "active",
        *(f"TFLOPs, {title}" for title in convention_titles(measured.study)),
        "lr", "tokens/s, quiet", "share of GEMM speed", "evaluation",
    )  # fmt: skip
    for name, system in measured.systems.items():
        costs = system.costs
        yield row(
            system.title, f"{costs['total_parameters']:,}", f"{costs['active_parameters']:,}",
            *(f"{costs[key]:.5f}" for key in CONVENTIONS), _rate(measured, plan, name),
            number(1 / tables.seconds_per_token(name), ",.0f"),
            number(tables.share_of_gemm(name), ".0%"), system.evaluation,
        )  # fmt: skip
    yield "\n" + " ".join(_about_systems(measured, plan))


def _about_systems(measured: Measured, plan: Plan) -> Iterator[str]:
    spreads = [f"{flops_spread(measured.systems, key):.1%}" for key in CONVENTIONS]
    yield (
        f"TFLOPs are forward, of 1024 tokens; the systems differ by {spreads[0]} and "
        f"{spreads[1]}. GEMM speed is that of a large square product in the same dtype, timed in "
        "turns."
    )
    # Empty in files of earlier versions.
    trained = measured.tables.runs["hardware"].dropna().value_counts()
    if len(trained):
        text = " and ".join(f"{name} ({count})" for name, count in sorted(trained.items()))
        both = ": repeated on the other, a run ends near the same loss, not exactly there"
        yield f"The runs were trained on {text}{both if len(trained) > 1 else ''}."
    speed, disturbed = measured.tables.speed, measured.tables.disturbed
    if len(speed):
        count = speed["processes"].max()
        processes = f", by {count:.0f} processes" if count > 1 else ""
        count = speed["threads"].max()  # NaN in files of earlier versions
        threads = f", {'1 thread' if count == 1 else f'{count:.0f} threads'} a process"
        threads = "" if math.isnan(count) else threads
        timed = " and ".join(sorted(set(speed["hardware"]))) + processes + threads
        yield f"Quiet timing, and all times from it, are of {timed}."
    rounds, planned = len({*speed["round"], *disturbed["round"]}), measured.study.speed.rounds
    if 0 < rounds < planned:
        yield f"The timing was ended after {rounds} of {planned} rounds."
    if len(disturbed):
        yield (
            f"Of {len(speed) + len(disturbed)} timings {len(disturbed)} are left out: that "
            f"product, just before, had less than {QUIET:.0%} of its best speed."
        )
    if plan.at_edge:
        names = listed(measured.systems[name].title for name in plan.at_edge)
        yield (
            f"Edge: the best rate of {names} is the lowest or highest "
            "that was tried, and a better one may lie beyond."
        )


def _rate(measured: Measured, plan: Plan, name: str) -> str:
    """Format the learning rate, or for a design their range; it is known before any run is over."""
    study, lr = measured.study, measured.systems[name].flags["lr"]
    if study.design:
        rates = [lr * rate for rate in study.rates_of(name)]
        return f"{min(rates):.2g} to {max(rates):.2g}"
    edge = " (edge)" if name in plan.at_edge else ""
    return f"{lr * plan.factors[name]:.2g}{edge}" if name in plan.factors else "n/a"


def trial_lines(measured: Measured) -> Iterator[str]:
    """Yield the loss of every trial, by its multiple of the system's learning rate."""
    trials = measured.tables.trials
    if not len(trials):
        return
    factors = sorted({float(factor) for factor in trials["factor"]})
    yield from ("", "## Trials", "")
    yield (
        "One run at each multiple of the system's learning rate; bold: the best. Systems with "
        "partial prediction by the loss behind the prefix.\n"
    )
    yield from table("system", "learning rate", *(f"x {factor:g}" for factor in factors))
    for name, system in measured.systems.items():
        own = trials[(trials["system"] == name) & (trials["status"] == DONE)]
        losses = dict(zip(own["factor"], own["loss"].astype(float), strict=True))
        cells = {factor: f"{loss:.3f}" for factor, loss in losses.items()}
        if losses:
            best = min(losses, key=losses.__getitem__)
            cells[best] = f"**{cells[best]}**"
        rate = f"{system.flags['lr']:g}"
        yield row(system.title, rate, *(cells.get(factor, "") for factor in factors))


def expert_lines(measured: Measured) -> Iterator[str]:
    """Yield the load of experts at the end of the longest runs, and the shares that reach none."""
    longest, runs = measured.study.longest, measured.tables.converged
    last = runs["key"][runs["horizon"] == longest]
    every = {name: measured.tables.loads(name, longest) for name in measured.systems}
    loads = {name: lines[lines["key"].isin(last)] for name, lines in every.items()}
    loads = {name: lines for name, lines in loads.items() if len(lines)}
    if not loads:
        return
    yield from ("", "## Experts", "")
    yield (
        "At the end of the longest runs, means over seeds, of the worst layer each: the emptiest "
        "and the fullest expert (1: an even share), the entropy of the loads (1: even), the share "
        "of choices that a capacity drops, and of those that a gate closes.\n"
    )
    yield from table("system", "load in training", "in evaluations", "entropy", "dropped", "closed")
    for name, lines in loads.items():
        trained, evaluated = (
            lines[lines[VALIDATION_LOSS].notna() == is_evaluation].groupby("key").last()
            for is_evaluation in (False, True)
        )
        cells = [
            f"{number(ends['load_min'].mean())} to {number(ends['load_max'].mean())}"
            for ends in (trained, evaluated)
        ]
        cells.append(number(evaluated["entropy"].mean(), ".3f"))
        shares = (trained[kind].astype(float).mean() for kind in ("drop_rate", "closed_rate"))
        yield row(measured.systems[name].title, *cells, *(number(share, ".1%") for share in shares))


def loss_lines(measured: Measured) -> Iterator[str]:
    horizons = sorted(measured.study.horizons)
    heads = [f"{horizon / 1e6:g}M tokens" for horizon in horizons]
    last = ("runs", "best rate") if measured.study.design else ("seeds", "sd of seeds")
    yield from table("system", *heads, *last)
    for name, system in measured.systems.items():
        field = measured.field(name)
        losses = [measured.tables.losses(name, horizon, field) for horizon in horizons]
        cells = [
            mean_of(measured.at(horizon, field).mean(name), list(own.values()))
            for horizon, own in zip(horizons, losses, strict=True)
        ]
        at_end = measured.at_end(field)
        fitted = _best(measured, at_end, name) if isinstance(at_end, Rates) else None
        behind = " (behind the prefix)" if system.predicts_suffix else ""
        spread = number(deviation(losses[-1]))
        yield row(f"{system.title}{behind}", *cells, seeds(losses), fitted or spread)


def _best(measured: Measured, rates: Rates, name: str) -> str:
    edge = " (edge)" if name in rates.at_edge else ""
    return number(measured.systems[name].flags["lr"] * rates.best(name)) + edge


def time_lines(measured: Measured, times: Sequence[Comparison]) -> Iterator[str]:
    """Yield how much sooner the subject reaches each other system's final loss."""
    unit = times[0].what if times else TOKENS
    what = "less time" if unit == SECONDS else "fewer tokens (no quiet timing yet)"
    yield (
        f"How many times {what} {measured.systems[measured.study.subject].title} needs to the loss "
        "at which each other system ends, by linear interpolation between converged points; at "
        "least so many (≥) where a seed is there at its first finite horizon already. The "
        "interval is of the seeds' tokens and, for time, of the rounds of the timing.\n"
    )
    of = "curves" if measured.study.design else "seeds"
    yield from table("to the loss of", "times less", "95 % interval", of)
    for comparison in times:
        mean, low, high = speedup(comparison)
        bound = "≥ " if comparison.is_bound else ""
        shown = not_reached(comparison) if comparison.unreached else f"{bound}{number(mean)}"
        is_unknown = comparison.is_bound or (not low and math.isinf(high))
        interval_of = "n/a" if is_unknown else f"{number(low)} to {number(high)}"
        yield row(
            measured.systems[comparison.rival].title, shown, interval_of, comparison.difference.n
        )


def crossing_lines(measured: Measured) -> Iterator[str]:
    """Yield where the subject's mean curve crosses that of each rival."""
    means = "mean curves over the horizons, of the seeds that both have at all of them"
    which = "curves of fitted minima over the horizons" if measured.study.design else means
    yield f"Crossings of the {which}; outside of them nothing is known.\n"
    yield from table("with", "at tokens")
    for name in measured.rivals():
        yield row(measured.systems[name].title, crossing(measured, name))


def crossing(measured: Measured, name: str) -> str:
    """Return the tokens where the subject's mean curve crosses a system's, or which ends lower."""
    subject, horizons = measured.study.subject, sorted(measured.study.horizons)
    field = measured.field(name, subject)
    whole = [
        {
            seed: losses
            for seed, (_, losses) in measured.curves(side, field).items()
            if len(losses) == len(horizons)
        }
        for side in (subject, name)
    ]
    common = whole[0].keys() & whole[1].keys()
    own, other = (
        [plain_mean([side[seed][place] for seed in common]) for place in range(len(horizons))]
        for side in whole
    )
    tokens_at = crossings(own, other, [measured.tables.tokens(horizon) for horizon in horizons])
    if tokens_at:
        return ", ".join(f"{tokens / 1e6:.3g}M" for tokens in tokens_at)
    if not math.isfinite(own[-1] + other[-1]):
        return "unknown"
    where = "below" if own[-1] < other[-1] else "above"
    return f"none: {measured.systems[subject].title} is {where} at the end"


def task_lines(measured: Measured) -> Iterator[str]:
    tables, tasks = measured.tables, measured.tables.labels(TASK)
    if not tasks:
        yield "None was scored: `tools/study.py evaluate --tasks ...`."
        return
    yield (
        "Accuracy in %, mean over seeds, ± the standard error that the number of examples "
        "leaves; all seeds see the same examples."
        + " The paper's figures are of models three orders of magnitude larger; n/a: we have "
        "no source for it." * measured.study.paper + "\n"
    )
    heads = [f"{task} ({PAPER_METRICS[task]})" if task in PAPER_METRICS else task for task in tasks]
    yield from table("system", *heads, "seeds")
    yield row("chance", *(CHANCE.get(task, "n/a") for task in tasks), "")
    for name in measured.systems:
        cells = [tables.values(TASK, task, name) for task in tasks]
        errors = [tables.sampling_error(task, name) for task in tasks]
        shown = (
            f"{100 * plain_mean([*cell.values()]):.1f} ± {100 * error:.1f}" if cell else "missing"
            for cell, error in zip(cells, errors, strict=True)
        )
        yield row(_at_all_positions(measured, name), *shown, seeds(cells))
    for model, figures in PAPER_FIGURES.items() if measured.study.paper else ():
        known = dict(zip(PAPER_METRICS, figures, strict=True))
        yield row(f"paper: {model}", *(known.get(task, "n/a") for task in tasks), "")


def breakdown_lines(measured: Measured) -> Iterator[str]:
    """Yield the loss by kind of token, and by BASE's rules of evaluation."""
    tables = measured.tables
    kinds = [kind for kind in BREAKDOWN if tables.labels(kind)]
    if not kinds:
        yield "Not looked at: `tools/study.py evaluate`."
        return
    yield (
        "Nats per token of the final checkpoints on windows of the validation documents, mean "
        "over seeds: by position in the window, by how frequent the token is (1: the most "
        "frequent fifth of the text), and by what the token repeats (new: not in the window "
        "before; seen: before, behind another token; after n: it and the n tokens before it "
        "stood there together, so that it can be copied). Compare rows of the same number of "
        "seeds."
    )
    for kind in kinds:
        yield ""
        yield from _means(measured, kind, kind, tables.labels(kind), list(measured.systems))
    routed = [name for name in measured.systems if tables.values(ROUTING, "prices", name)]
    if routed:
        yield "\nBASE balances in training, and evaluates greedily or by the mean prices.\n"
        rules = [
            rule
            for rule in tables.labels(ROUTING)
            if any(tables.values(ROUTING, rule, name) for name in routed)
        ]
        yield from _means(measured, "loss with", ROUTING, rules, routed)


def document_lines(measured: Measured) -> Iterator[str]:
    """Yield bits per byte and the differences from the subject, over seeds and over documents, if
    documents were scored."""
    tables, subject = measured.tables, measured.study.subject
    labels, names = tables.labels(DOCUMENT), measured.trained_on(VALIDATION_LOSS)
    if not labels or subject not in names:
        return
    yield from ("", "## Bits per byte, by document", "")
    yield (
        f"Of the final checkpoints on windows of all {len(labels)} validation documents, each "
        "document as much as another, and the difference from "
        f"{measured.systems[subject].title}, with 95 % intervals: over seeds, for these "
        "documents; over documents, for these trainings; and over both, as for other seeds and "
        "documents of this kind.\n"
    )
    yield from table("system", "bits per byte", "difference", "over seeds", "over documents (df)",
                     "over both", "seeds")  # fmt: skip
    values = [{name: tables.values(DOCUMENT, label, name) for name in names} for label in labels]
    means = {
        name: {
            seed: plain_mean([document[name][seed] for document in values])
            for seed in values[0][name]
        }
        for name in names
    }
    whole, fits = measured.compared(means), [measured.compared(document) for document in values]
    for name in names:
        by_seed = whole.difference(name, subject)
        gaps = [fit.difference(name, subject).mean for fit in fits]
        by_document = paired(dict(enumerate(gaps)), dict.fromkeys(range(len(gaps)), 0.0))
        both = with_error(by_seed, by_document.error, df=by_document.df)
        intervals = [f"{number(x.low)} to {number(x.high)}" for x in (by_seed, by_document, both)]
        intervals[1] += f" ({number(by_document.df)})"
        others = ["", "", "", ""] if name == subject else [number(by_seed.mean), *intervals]
        yield row(measured.systems[name].title, number(whole.mean(name).mean, ".4f"), *others,
                  len(means[name]))  # fmt: skip


def _means(
    measured: Measured, title: str, kind: str, labels: Sequence[str], names: Sequence[str]
) -> Iterator[str]:
    yield from table(title, *labels, "seeds")
    for name in names:
        cells = [measured.tables.values(kind, label, name) for label in labels]
        means = (number(plain_mean([*cell.values()])) for cell in cells)
        yield row(_at_all_positions(measured, name), *means, seeds(cells))


def _at_all_positions(measured: Measured, name: str) -> str:
    """Return a system's title for numbers over all positions, marked if partial prediction never
    trains on some of them."""
    system = measured.systems[name]
    return f"{system.title} (also in the prefix)" if system.predicts_suffix else system.title
