"""Write report.md, report.json and the figures of a study from its CSV files alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_smlp.durable import write_durably
from megatron_smlp.evaluation.reports import PAPER_FIGURES, PAPER_METRICS
from megatron_smlp.study.cells import (
    deviation,
    mean_of,
    not_reached,
    number,
    plain_mean,
    row,
    seeds,
    share,
    speedup,
    table,
)
from megatron_smlp.study.comparisons import (
    comparison_lines,
    deviation_lines,
    primary_lines,
    titles,
)
from megatron_smlp.study.fairness import CONVENTIONS, convention_titles, flops_spread
from megatron_smlp.study.figures import Drawing
from megatron_smlp.study.made_by import Versions
from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.numbers import curves, numbers
from megatron_smlp.study.plan import Plan
from megatron_smlp.study.rates import Rates
from megatron_smlp.study.results import ROUTING, TASK, Results
from megatron_smlp.study.state import FAILED, State
from megatron_smlp.study.statistics import (
    CONFIRMED,
    REFUTED,
    UNDECIDED,
    crossings,
)
from megatron_smlp.study.study_file import Study
from megatron_smlp.study.systems import System
from megatron_smlp.study.tables import QUIET, Tables
from megatron_smlp.study.verdicts import (
    SECONDS,
    TOKENS,
    Claim,
    Comparison,
    claims_of,
    cost_ratio,
    loss_field,
    others_of,
    primary_looks,
    rivals,
)
from megatron_smlp.training.metrics_file import finite


def write_report(
    known: State, results: Results, *, accept_other_sources: bool = False
) -> list[Path]:
    """Write everything that a reader sees; return the files."""
    page = Page(known, results, accept_other_sources=accept_other_sources)
    written = []
    drawing = Drawing(page.study, page.systems, page.tables, page.plan.factors)
    for name, figure in drawing.figures(page.times):
        written.append(results.folder / f"{name}.png")
        figure.savefig(written[-1])
    page.figures = [path.name for path in written]
    for file, text in (("report.md", page.text()), ("report.json", page.json())):
        written.append(results.folder / file)
        write_durably(written[-1], text)
    return written


def costs_to_losses(
    study: Study, systems: Mapping[str, System], tables: Tables
) -> list[Comparison]:
    """Return each system's cost over each other one's, to the loss at which that one ends."""
    unit = SECONDS if tables.has_speed(*systems) else TOKENS
    over = [name for name in systems if tables.losses(name, study.longest, VALIDATION_LOSS)]
    return [
        cost_ratio(study, systems, tables, pair=pair, unit=unit)
        for pair in itertools.product(systems, over)
        if pair[0] != pair[1]
    ]


class Page:
    """report.md and report.json, by the files of the results; figures are the caller's to draw."""

    def __init__(
        self, known: State, results: Results, *, accept_other_sources: bool = False
    ) -> None:
        self.study, self.systems, self.plan = known.study, known.systems, known.plan()
        self.file = known.file.absolute()
        if self.file.is_relative_to(Path.cwd()):
            self.file = self.file.relative_to(Path.cwd())
        self.lacking = list(_lacking(known, self.plan))
        self.tables = Tables.of(results).of_runs({run.key for run in self.plan.runs})
        self.fingerprints = results.fingerprints
        self.versions = Versions.of(self.tables.runs, self.fingerprints)
        self.accepts = accept_other_sources
        if not accept_other_sources:
            keys = {*self.tables.runs["key"]} - {*self.versions.others["key"]}
            self.tables = self.tables.of_runs(keys)
        about = (self.study, self.systems, self.tables)
        self.claims = claims_of(*about)
        self.others = others_of(*about)
        self.looks = primary_looks(*about) if self.study.primary else []
        self.costs = costs_to_losses(*about)
        rival = set(rivals(self.study, self.systems))
        self.times = [
            each for each in self.costs if each.one == self.study.subject and each.other in rival
        ]
        self.figures: Sequence[str] = ()

    def text(self) -> str:
        """Return report.md."""
        has_curves = len(self.study.horizons) > 1
        is_fitted = self.study.design is not None
        number_of = "the fitted minimum over rates" if is_fitted else "the mean over seeds"
        about = (self.study, self.systems)
        return "\n".join([
            f"# Study `{self.study.name}`",
            "",
            f"Written by `tools/study.py report {self.file}` from runs.csv and "
            "curves.csv beside this file. Losses are in nats per token, of validation documents "
            "that nobody trained on, the same tokens for every system and seed. ± is the 95 % "
            f"interval of {number_of}.",
            *(["", f"**Not whole**: {'; '.join(self.lacking)}."] if self.lacking else []),
            *self._other_sources(),
            *primary_lines(*about, self.looks),
            *("", "## Claims", "", *self._claims()),
            *(["", "## Comparisons", "", *comparison_lines(*about, self.claims)]
              if self.claims else []),
            *self._others(),
            *deviation_lines(*about, self.tables),
            *("", "## Systems", "", *self._systems()),
            *("", "## Losses", "", *self._losses()),
            *("", "## Time to the others' losses", "", *self._times()),
            *(["", "## From each to each other's loss", "", *self._costs()] if has_curves else []),
            *("", "## Where curves cross", "", *self._crossings()),
            *("", "## Zero-shot tasks", "", *self._tasks()),
            *("", "## Where the loss lies", "", *self._breakdown()),
            *("", "## Figures", ""),
            *(f"![{name}]({name})\n" for name in self.figures),
            *(("## What is not comparable with the paper", "", *NOT_COMPARABLE, "")
              if self.study.paper else ()),
        ])  # fmt: skip

    def json(self) -> str:
        """Return report.json; numbers that JSON lacks are texts."""
        content = {
            "study": dataclasses.asdict(self.study),
            "primary": [dataclasses.asdict(each) for each in self.looks],
            "claims": [dataclasses.asdict(claim) for claim in self.claims],
            "others": [dataclasses.asdict(each) for each in self.others.comparisons],
            "costs": [dataclasses.asdict(each) for each in self.costs],
            "losses": {
                name: {
                    str(horizon): self.tables.losses(name, horizon, loss_field(system))
                    for horizon in self.study.horizons
                }
                for name, system in self.systems.items()
            },
        }
        return json.dumps(finite(content), indent=1) + "\n"

    def _other_sources(self) -> Iterator[str]:
        """Yield which runs are of other sources than the rest, and whether they count."""
        others = self.versions.others.fillna({"commit": "", "sources": ""})
        if not len(others):
            return
        what = "; ".join(
            f"{count} of {system}, of sources {sources or 'not known'} (commit "
            f"{commit or 'not known'})"
            for (system, sources, commit), count in others.value_counts(
                ["system", "sources", "commit"], sort=False
            ).items()
        )
        yield from ("", (
            f"**Other sources**: the following runs are not known to compute as the rest of them, "
            f"which are of sources {self.versions.sources or 'not known'}, and "
            + ("count by --accept-other-sources" if self.accepts else
               "are left out; --accept-other-sources takes them in")
            + f": {what}."
        ))  # fmt: skip

    def _claims(self) -> Iterator[str]:
        if not self.claims:
            yield "None of the paper's is tested." if self.study.paper else "None is tested."
            return
        yield from table("claim", "says", "verdict", "because")
        for claim in self.claims:
            because = "; ".join([*self._because(claim), *claim.notes])
            yield row(claim.name, claim.text, f"**{claim.verdict}**", because or "not planned")

    def _because(self, claim: Claim) -> list[str]:
        is_one_against_all = len({each.one for each in claim.comparisons}) == 1
        words = []
        for said in (CONFIRMED, REFUTED, UNDECIDED):
            those = [each for each in claim.comparisons if each.verdict == said]
            if those and is_one_against_all:
                others = (self.systems[each.other].title for each in those)
                words.append(f"{said} against {', '.join(others)}")
            elif those:
                pairs = (" against ".join(titles(self.systems, each)) for each in those)
                words.append(f"{said}: {', '.join(pairs)}")
        return words

    def _others(self) -> Iterator[str]:
        if not self.others.comparisons:
            return
        yield from ("", "## Other comparisons", "")
        pairs = (
            "Pairs of no claim of the paper" if self.study.paper else "Pairs that the study names"
        )
        yield (
            f"{pairs}, by p after Holm over these alone. Confirmed: the first of the pair has the "
            "lower loss; refuted: the second has.\n"
        )
        yield from comparison_lines(self.study, self.systems, [self.others])
        yield from (f"\n{note}." for note in self.others.notes)

    def _systems(self) -> Iterator[str]:
        titles = convention_titles(self.study)
        yield from table(
            "system", "parameters", "active", *(f"TFLOPs, {title}" for title in titles),
            "lr", "tokens/s, quiet", "share of GEMM speed", "tokens/s, as trained", "evaluation",
        )  # fmt: skip
        for name, system in self.systems.items():
            costs = system.costs
            yield row(
                system.title, f"{costs['total_parameters']:,}", f"{costs['active_parameters']:,}",
                *(f"{costs[key]:.5f}" for key in CONVENTIONS), self._rate(name),
                number(1 / self.tables.seconds_per_token(name), ",.0f"),
                number(self.tables.share_of_gemm(name), ".0%"),
                number(self._as_trained(name), ",.0f"), system.evaluation,
            )  # fmt: skip
        yield "\n" + " ".join(self._about_systems())

    def _about_systems(self) -> Iterator[str]:
        spreads = [f"{flops_spread(self.systems, key):.1%}" for key in CONVENTIONS]
        yield (
            f"TFLOPs are forward, of 1024 tokens; the systems differ by {spreads[0]} and "
            f"{spreads[1]}. Speed as trained is of a machine that runs shared: it is not a result. "
            "GEMM speed is that of a large square product in the same dtype, timed in turns."
        )
        # Files of earlier versions do not say it.
        trained = self.tables.runs["hardware"].dropna().value_counts()
        if len(trained):
            text = " and ".join(f"{name} ({count})" for name, count in sorted(trained.items()))
            both = ": repeated on the other, a run ends near the same loss, not exactly there"
            yield f"The runs were trained on {text}{both if len(trained) > 1 else ''}."
        speed, disturbed = self.tables.speed, self.tables.disturbed
        if len(speed):
            count = speed["processes"].max()
            processes = f", by {count:.0f} processes" if count > 1 else ""
            count = speed["threads"].max()  # files of earlier versions do not say it
            threads = f", {'1 thread' if count == 1 else f'{count:.0f} threads'} a process"
            threads = "" if math.isnan(count) else threads
            timed = " and ".join(sorted(set(speed["hardware"]))) + processes + threads
            yield f"Quiet timing, and all times from it, are of {timed}."
        rounds = len({*speed["round"], *disturbed["round"]})
        if 0 < rounds < self.study.speed.rounds:
            yield f"The timing was ended after {rounds} of {self.study.speed.rounds} rounds."
        if len(disturbed):
            yield (
                f"Of {len(speed) + len(disturbed)} timings {len(disturbed)} are left out: that "
                f"product, just before, had less than {QUIET:.0%} of its best speed."
            )
        if self.plan.at_edge:
            names = ", ".join(self.systems[name].title for name in self.plan.at_edge)
            yield (
                f"Edge: the best rate of {names} is the lowest or highest "
                "that was tried, and a better one may lie beyond."
            )

    def _labelled(self, name: str) -> str:
        """Return a name with the loss that it is compared by, where that is another one."""
        system = self.systems[name]
        return f"{system.title} (behind the prefix)" if system.predicts_suffix else system.title

    def _rate(self, name: str) -> str:
        """Return the learning rate, which is chosen before a run of it is over."""
        if self.study.design:
            rates = [self.systems[name].flags["lr"] * rate for rate in self.study.rates_of(name)]
            return f"{min(rates):.2g} to {max(rates):.2g}"
        edge = " (edge)" if name in self.plan.at_edge else ""
        factor = self.plan.factors.get(name)
        return f"{self.systems[name].flags['lr'] * factor:.2g}{edge}" if factor else "n/a"

    def _as_trained(self, name: str) -> float:
        runs = self.tables.converged
        return float(runs[runs["system"] == name]["tokens_per_second"].astype(float).median())

    def _losses(self) -> Iterator[str]:
        about = (self.study, self.systems, self.tables)
        horizons = sorted(self.study.horizons)
        heads = [f"{horizon / 1e6:g}M tokens" for horizon in horizons]
        last = ("runs", "best rate") if self.study.design else ("seeds", "sd of seeds")
        yield from table("system", *heads, *last, "sd of evaluations")
        found = {
            (horizon, field): numbers(*about, horizon=horizon, field=field)
            for horizon in horizons
            for field in dict.fromkeys(map(loss_field, self.systems.values()))
        }
        for name, system in self.systems.items():
            field = loss_field(system)
            cells = [self.tables.losses(name, horizon, field) for horizon in horizons]
            means = [found[horizon, field].mean(name) for horizon in horizons]
            at_end = found[horizons[-1], field]
            yield row(
                self._labelled(name),
                *(mean_of(mean, list(cell.values()))
                  for mean, cell in zip(means, cells, strict=True)),
                seeds(cells), self._best(at_end, name) if isinstance(at_end, Rates) else
                number(deviation(cells[-1])),
                number(self.tables.last_noise(name, self.study.longest, field)),
            )  # fmt: skip

    def _best(self, found: Rates, name: str) -> str:
        outside = " (outside)" if name in found.outside else ""
        return number(self.systems[name].flags["lr"] * found.best(name)) + outside

    def _times(self) -> Iterator[str]:
        unit = self.times[0].what if self.times else TOKENS
        what = "less time" if unit == SECONDS else "fewer tokens (no quiet timing yet)"
        yield (
            f"How many times {what} {self.systems[self.study.subject].title} needs to the loss at "
            "which each other system ends, by linear interpolation between converged points; at "
            "least so many (≥) where a seed is there at its first finite horizon already. The "
            "interval is of the seeds' tokens and, for time, of the rounds of the timing.\n"
        )
        yield from table("to the loss of", "times less", "95 % interval", "seeds")
        for each in self.times:
            mean, low, high = speedup(each)
            bound = "≥ " if each.is_bound else ""
            shown = not_reached(each) if each.unreached else f"{bound}{number(mean)}"
            interval_of = "n/a" if each.is_bound else f"{number(low)} to {number(high)}"
            yield row(self.systems[each.other].title, shown, interval_of, each.found.n)

    def _costs(self) -> Iterator[str]:
        names = [name for name in self.systems if any(each.other == name for each in self.costs)]
        unit = self.costs[0].what if self.costs else TOKENS
        yield (
            "What the system of a row needs to come to the loss at which that of a column ends, "
            f"over what that one needed, in {unit}, as a mean; below 1 the row is ahead. The "
            "mirrored cell is another question: the way to the other one's loss. Bold: the 95 % "
            "interval of this pair alone, which is in report.json, is on one side of 1; of pairs "
            "that are equal one in twenty is bold by chance. ≤: a seed of the row is there at its "
            "first horizon already, or before. Never: no seed of the row comes there. As losses "
            "fall fastest at first, straight lines between horizons overstate what the row needs.\n"
        )
        shown = {name: self._labelled(name) for name in names}
        yield from table("", *shown.values())
        cells = {(each.one, each.other): share(each) for each in self.costs}
        for name, label in shown.items():
            yield row(label, *(cells.get((name, other), "") for other in names))

    def _crossings(self) -> Iterator[str]:
        yield (
            "Crossings of the mean curves over the horizons, of the seeds that both have at all of "
            "them; outside of them nothing is known.\n"
        )
        yield from table("with", "at tokens")
        for name in rivals(self.study, self.systems):
            yield row(self.systems[name].title, self._crossing(name))

    def _crossing(self, name: str) -> str:
        field = loss_field(self.systems[name], self.systems[self.study.subject])
        horizons = sorted(self.study.horizons)
        about = (self.study, self.systems, self.tables)
        sides = [curves(*about, name=each, field=field) for each in (self.study.subject, name)]
        whole = [
            {seed: losses for seed, (_, losses) in side.items() if len(losses) == len(horizons)}
            for side in sides
        ]
        common = whole[0].keys() & whole[1].keys()
        means = [
            [plain_mean({seed: side[seed][place] for seed in common})
             for place in range(len(horizons))]
            for side in whole
        ]  # fmt: skip
        tokens_of = [self.tables.tokens(horizon) for horizon in horizons]
        found = crossings(means[0], means[1], tokens_of)
        if found:
            return ", ".join(f"{tokens / 1e6:.3g}M" for tokens in found)
        below = means[0][-1] < means[1][-1]
        is_known = all(math.isfinite(side[-1]) for side in means)
        where = "below" if below else "above"
        subject = self.systems[self.study.subject].title
        return f"none: {subject} is {where} at the end" if is_known else "unknown"

    def _tasks(self) -> Iterator[str]:
        tasks = self.tables.labels(TASK)
        if not tasks:
            yield "None was scored: `tools/study.py evaluate --tasks ...`."
            return
        yield (
            "Accuracy in %, mean over seeds, ± the standard error that the number of examples "
            "leaves; all seeds see the same examples."
            + " The paper's figures are of models three orders of magnitude larger; n/a: we have "
            "no source for it." * self.study.paper + "\n"
        )
        heads = [f"{task} ({PAPER_METRICS.get(task, 'acc')})" for task in tasks]
        yield from table("system", *heads, "seeds")
        chances = (f"{CHANCE[task]:g}" if task in CHANCE else "n/a" for task in tasks)
        yield row("chance", *chances, "")
        for name in self.systems:
            cells = [self.tables.values(TASK, task, name) for task in tasks]
            errors = [self.tables.sampling_error(task, name) for task in tasks]
            shown = (
                f"{100 * plain_mean(cell):.1f} ± {100 * error:.1f}" if cell else "missing"
                for cell, error in zip(cells, errors, strict=True)
            )
            yield row(self._at_all_positions(name), *shown, seeds(cells))
        columns = list(PAPER_METRICS)
        for model, figures in PAPER_FIGURES.items() if self.study.paper else ():
            known = dict(zip(columns, figures, strict=True))
            yield row(f"paper: {model}", *(known.get(task, "n/a") for task in tasks), "")

    def _breakdown(self) -> Iterator[str]:
        kinds = [kind for kind in BREAKDOWN if self.tables.labels(kind)]
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
            yield from self._means(kind, kind, self.tables.labels(kind), list(self.systems))
        rules = self.tables.labels(ROUTING)
        routed = [name for name in self.systems if self.tables.values(ROUTING, "prices", name)]
        if routed:
            yield "\nBASE balances in training, and evaluates greedily or by the mean prices.\n"
            rules = [rule for rule in rules if self.tables.values(ROUTING, rule, routed[0])]
            yield from self._means("loss with", ROUTING, rules, routed)

    def _means(
        self, title: str, kind: str, labels: Sequence[str], names: Sequence[str]
    ) -> Iterator[str]:
        yield from table(title, *labels, "seeds")
        for name in names:
            cells = [self.tables.values(kind, label, name) for label in labels]
            means = (number(plain_mean(cell)) for cell in cells)
            yield row(self._at_all_positions(name), *means, seeds(cells))

    def _at_all_positions(self, name: str) -> str:
        """Return a system's name beside numbers of all positions, also of those that partial
        prediction never trains on."""
        system = self.systems[name]
        return f"{system.title} (also in the prefix)" if system.predicts_suffix else system.title


BREAKDOWN = ("position", "frequency", "repeat")
CHANCE = {"copa": 50, "piqa": 50, "storycloze": 50, "winogrande": 50, "hellaswag": 25}

NOT_COMPARABLE = (
    "* The models, the data and the vocabulary are smaller by orders of magnitude, and so is the "
    "length of the training.",
    "* The learning rate is constant and then decays (WSD), so that every horizon is converged; "
    "the paper's schedule is another.",
    "* The learning rate of every system is tuned, with as many trials; nothing else is.",
    "* Speed is of this machine; the paper's is of many GPUs with communication between them.",
)


def _lacking(known: State, plan: Plan) -> Iterator[str]:
    """Yield what a study that is not whole lacks, in words."""
    endings = (known.ending(run) for run in plan.runs)
    over = sum(ending is not None and ending["status"] != FAILED for ending in endings)
    planned = len(plan.runs) + len(plan.pending)
    if over < planned:
        yield f"{over} of {planned} runs are over"
    if failure := known.failure(plan):
        yield failure
