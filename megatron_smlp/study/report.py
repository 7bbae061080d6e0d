"""Write report.md, report.json and the figures of a study from its CSV files alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.durable import write_durably
from megatron_smlp.metrics_records import finite
from megatron_smlp.study.comparisons import (
    claim_lines,
    comparison_lines,
    deviation_lines,
    other_lines,
    primary_lines,
)
from megatron_smlp.study.figures import Drawing
from megatron_smlp.study.made_by import Versions
from megatron_smlp.study.measured import Measured
from megatron_smlp.study.plan import Plan
from megatron_smlp.study.results import Results
from megatron_smlp.study.sections import (
    breakdown_lines,
    crossing_lines,
    document_lines,
    expert_lines,
    loss_lines,
    system_lines,
    task_lines,
    time_lines,
    trial_lines,
)
from megatron_smlp.study.state import FAILED, State
from megatron_smlp.study.tables import Tables
from megatron_smlp.study.verdicts import claims_of, others_of, primary_looks, times_to_losses


def write_report(page: Page) -> list[Path]:
    written = []
    for name, figure in Drawing(page.measured, page.plan.factors).figures(page.times):
        written.append(page.folder / f"{name}.png")
        figure.savefig(written[-1])
    page.figures = [path.name for path in written]
    for file, text in (("report.md", page.text()), ("report.json", page.json())):
        written.append(page.folder / file)
        write_durably(written[-1], text)
    return written


class Page:
    """report.md and report.json, made from the files of results; the caller draws the figures."""

    def __init__(
        self, known: State, results: Results, *, accept_other_sources: bool = False
    ) -> None:
        self.study, self.plan, self.folder = known.study, known.plan(), results.folder
        self.file = known.file.absolute()
        if self.file.is_relative_to(Path.cwd()):
            self.file = self.file.relative_to(Path.cwd())
        self.lacking = list(_lacking(known, self.plan))
        tables = Tables.of(results).of_runs({run.key for run in self.plan.runs})
        self.versions = Versions.of(tables.runs, results.fingerprints)
        self.accepts = accept_other_sources
        if not accept_other_sources:
            tables = tables.of_runs({*tables.runs["key"]} - {*self.versions.others["key"]})
        self.measured = Measured(self.study, known.systems, tables)
        self.claims = claims_of(self.measured)
        self.others = others_of(self.measured)
        self.looks = primary_looks(self.measured)
        self.times = times_to_losses(self.measured)
        self.figures: Sequence[str] = ()

    def text(self) -> str:
        measured, paper = self.measured, self.study.paper
        is_fitted = self.study.design is not None
        number_of = "the fitted minimum over rates" if is_fitted else "the mean over seeds"
        return "\n".join([
            f"# Study `{self.study.name}`",
            "",
            f"Written by `tools/study.py report {self.file}` from runs.csv and "
            "curves.csv beside this file. Losses are in nats per token, of validation documents "
            "that nobody trained on, the same tokens for every system and seed. ± is the 95 % "
            f"interval of {number_of}.",
            *(["", f"**Not whole**: {'; '.join(self.lacking)}."] if self.lacking else []),
            *self._other_sources(),
            *primary_lines(measured, self.looks),
            *("", "## Claims", "", *claim_lines(measured, self.claims)),
            *(["", "## Comparisons", "", *comparison_lines(measured, self.claims)]
              if self.claims else []),
            *other_lines(measured, self.others),
            *deviation_lines(measured),
            *("", "## Systems", "", *system_lines(measured, self.plan)),
            *trial_lines(measured),
            *("", "## Losses", "", *loss_lines(measured)),
            *expert_lines(measured),
            *(("", "## Time to the others' losses", "", *time_lines(measured, self.times),
               "", "## Where curves cross", "", *crossing_lines(measured))
              if len(self.study.horizons) > 1 else ()),
            *("", "## Zero-shot tasks", "", *task_lines(measured)),
            *("", "## Where the loss lies", "", *breakdown_lines(measured)),
            *document_lines(measured),
            *("", "## Figures", ""),
            *(f"![{name}]({name})\n" for name in self.figures),
            *(("## What is not comparable with the paper", "", *NOT_COMPARABLE, "")
              if paper else ()),
        ])  # fmt: skip

    def json(self) -> str:
        """Return report.json, with numbers that are not finite as strings."""
        measured = self.measured
        lists: dict[str, Sequence[Any]] = {
            "primary": self.looks, "claims": self.claims, "others": self.others.comparisons,
            "times": self.times,
        }  # fmt: skip
        content = {
            "study": dataclasses.asdict(self.study),
            **{name: [dataclasses.asdict(record) for record in own] for name, own in lists.items()},
            "losses": {
                name: {
                    str(horizon): measured.tables.losses(name, horizon, measured.field(name))
                    for horizon in self.study.horizons
                }
                for name in measured.systems
            },
        }
        return json.dumps(finite(content), indent=1) + "\n"

    def _other_sources(self) -> Iterator[str]:
        """Say which runs have other sources than the rest, and whether they count."""
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


NOT_COMPARABLE = (
    "* The models, the data and the vocabulary are smaller by orders of magnitude, and so is the "
    "length of the training.",
    "* The learning rate is constant and then decays (WSD), so that every horizon is converged; "
    "the paper's schedule is another.",
    "* The learning rate of every system is tuned, with as many trials; nothing else is.",
    "* Speed is of this machine; the paper's is of many GPUs with communication between them.",
)


def _lacking(known: State, plan: Plan) -> Iterator[str]:
    """Describe what an incomplete study lacks."""
    endings = (known.ending(run) for run in plan.runs)
    over = sum(ending is not None and ending["status"] != FAILED for ending in endings)
    planned = len(plan.runs) + len(plan.pending)
    if over < planned:
        yield f"{over} of {planned} runs are over"
    if failure := known.failure(plan):
        yield failure
