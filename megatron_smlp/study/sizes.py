"""Report on a study across its sizes: differences against tokens, ranks, and predictions.

Each size is a study of its own, with its own report. Across sizes, the only fit is the line that
predicts a size from the two before it, of widths D_1 and D_2; nothing else goes beyond the data:

    d(D) = d_2 + (d_2 - d_1) log(D / D_2) / log(D_2 / D_1)

Write the prediction before that size is trained. It holds if the trend continues: its interval
covers the runs of those two sizes, not whether the trend does continue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megatron_smlp.durable import write_durably
from megatron_smlp.plotting.figures import DPI, legend, plain_log, styles, tidy
from megatron_smlp.plotting.series import AXES, unit_for
from megatron_smlp.study.cells import number, row, table
from megatron_smlp.study.measured import Measured
from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.report import Page
from megatron_smlp.study.statistics import ALPHA, Difference, of_error, unknown, welch

FIGURE = "differences.png"
PANELS = 3
"""Panels per row of the figure."""


def write_sizes(name: str, pages: Sequence[Page], folder: Path) -> list[Path]:
    """Write report.md across the sizes of a study, and its figure; return their paths."""
    sizes = Sizes(name, pages)
    folder.mkdir(parents=True, exist_ok=True)
    report, figure = folder / "report.md", folder / FIGURE
    write_durably(report, sizes.text())
    if not sizes.rivals:
        return [report]
    sizes.figure().savefig(figure)
    return [figure, report]


class Sizes:
    """The sizes of a study, narrowest first; all of them contain its subject."""

    def __init__(self, name: str, pages: Sequence[Page]) -> None:
        self.name, self.file = name, pages[0].file
        self.subject = pages[0].study.subject
        self.sizes = sorted((page.measured for page in pages), key=self.width)
        self.begun = [size for size in self.sizes if len(size.tables.runs)]
        systems = (system for size in self.sizes for system in size.systems.values())
        self.titles = {system.name: system.title for system in systems}
        self.rivals = [name for name in self.titles if name != self.subject]
        self.horizons = sorted({horizon for size in self.sizes for horizon in size.study.horizons})

    def title(self, size: Measured) -> str:
        return size.study.name.removeprefix(f"{self.name}-")

    def width(self, size: Measured) -> int:
        return int(size.systems[self.subject].flags["hidden_size"])

    def difference(self, size: Measured, rival: str, horizon: int) -> Difference:
        """Return the subject's loss minus a rival's; unknown without that rival or horizon."""
        if rival not in size.systems or horizon not in size.study.horizons:
            return unknown(math.nan, 0)
        field = size.field(self.subject, rival)
        return size.at(horizon, field).difference(self.subject, rival)

    def text(self) -> str:
        """Return the text of report.md, which lies next to the folders of the sizes."""
        names = [size.study.name for size in self.begun]
        reports = ", ".join(f"[{name}]({name}/report.md)" for name in names)
        return "\n".join([
            f"# Study `{self.name}`: over its sizes",
            "",
            f"Written by `tools/study.py report {self.file}` from the CSV files of each size, "
            f"which has a report of its own: {reports}. Differences are in nats per token at equal "
            "tokens and FLOPs, ± is of 95 %. No exponent is fitted, and nothing is said beyond the "
            "sizes and tokens that were trained.",
            *("", "## Differences", "", *self._differences()),
            *(("", f"![Differences against tokens]({FIGURE})") if self.rivals else ()),
            *("", "## Ranks", "", *self._ranks()),
            *("", "## Predictions", "", *self._predictions(), ""),
        ])  # fmt: skip

    def _differences(self) -> Iterator[str]:
        heads = [f"{horizon / 1e6:g}M tokens" for horizon in self.horizons]
        yield f"{self.titles[self.subject]} minus each other system; below 0: it is ahead.\n"
        yield from table("size", "D", "against", *heads, "slope per doubling of tokens")
        for size in self.begun:
            for rival in self.rivals:
                if rival in size.systems:
                    gaps = [self.difference(size, rival, horizon) for horizon in self.horizons]
                    slope = size.slope(self.subject, rival)
                    yield row(self.title(size), self.width(size), self.titles[rival],
                              *map(_with_interval, (*gaps, slope)))  # fmt: skip

    def _ranks(self) -> Iterator[str]:
        yield (
            "Losses in their order, of systems that are trained on all positions; `<` between "
            "neighbours that differ at p < 0.05, else `~`. Equal time is that in which the "
            "system with the fastest steps is at these tokens; losses there are interpolated, in "
            "log tokens, between horizons.\n"
        )
        yield from table("size", "tokens", "at equal tokens and FLOPs", "at equal time")
        for size in self.begun:
            for horizon in sorted(size.study.horizons):
                yield row(self.title(size), f"{horizon / 1e6:g}M",
                          self._at_equal_flops(size, horizon), self._at_equal_time(size, horizon)
                          )  # fmt: skip

    def _at_equal_flops(self, size: Measured, horizon: int) -> str:
        at = size.at(horizon, VALIDATION_LOSS)
        means = {name: at.mean(name).mean for name in size.trained_on(VALIDATION_LOSS)}
        known = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        order = sorted(known, key=known.__getitem__)
        parts: list[str] = []
        for place, name in enumerate(order):
            if place:
                parts.append("<" if at.difference(order[place - 1], name).p < ALPHA else "~")
            parts.append(f"{self.titles[name]} {means[name]:.3f}")
        return " ".join(parts) or "n/a"

    def _at_equal_time(self, size: Measured, horizon: int) -> str:
        names = size.trained_on(VALIDATION_LOSS)
        if not (names and size.tables.has_speed(*names)):
            return "no quiet timing"
        seconds = {name: size.tables.seconds_per_token(name) for name in names}
        time = size.tables.tokens(horizon) * min(seconds.values())
        losses = {}
        for name in names:
            horizons = sorted(size.study.horizons)
            x = [math.log(size.tables.tokens(end)) for end in horizons]
            y = [size.at(end, VALIDATION_LOSS).mean(name).mean for end in horizons]
            losses[name] = float(np.interp(math.log(time / seconds[name]), x, y, left=math.nan))
        known = sorted((loss, name) for name, loss in losses.items() if math.isfinite(loss))
        early = [self.titles[name] for name, loss in losses.items() if not math.isfinite(loss)]
        order = "; ".join(f"{self.titles[name]} {loss:.3f}" for loss, name in known)
        return order + f" (no loss there: {'; '.join(early)})" * bool(early)

    def _predictions(self) -> Iterator[str]:
        if len(self.sizes) < 3:
            yield "None: it takes two sizes to predict a third."
            return
        yield (
            "Of each size by the two before it, if the difference goes on by as much per doubling "
            "of D. A system that has one run there deviates as runs of the size before.\n"
        )
        yield from table("size", "against", "tokens", "predicted", "observed", "error", "within")
        for three in zip(self.sizes, self.sizes[1:], self.sizes[2:], strict=False):
            for rival in self.rivals:
                # Sizes of equal width, such as those that differ in length, define no line.
                if all(rival in size.systems for size in three) and self.width(
                    three[0]
                ) != self.width(three[1]):
                    for horizon in sorted(three[-1].study.horizons):
                        yield self._predicted(three, rival, horizon)

    def _predicted(self, three: tuple[Measured, ...], rival: str, horizon: int) -> str:
        *_, last, size = three
        *sides, observed = (self.difference(size, rival, horizon) for size in three)
        predicted = prediction(sides, [self.width(size) for size in three])
        error, own_df = observed.error, observed.df
        if not math.isfinite(error):
            error = math.sqrt(2) * last.at(horizon, last.field(self.subject, rival)).sd
            own_df = sides[-1].df
        df = welch([(predicted.error, predicted.df), (error, own_df)])
        both = math.hypot(predicted.error, error)
        missed = of_error(observed.mean - predicted.mean, both, df=df, n=observed.n)
        if not math.isfinite(missed.mean):
            is_within = "not yet"
        elif not math.isfinite(missed.high):
            is_within = "no interval"
        else:
            is_within = "yes" if missed.low <= 0 <= missed.high else "**no**"
        return row(
            self.title(size), self.titles[rival], f"{horizon / 1e6:g}M", _with_interval(predicted),
            number(observed.mean, ".3f"), _with_interval(missed),
            is_within,
        )  # fmt: skip

    def figure(self) -> Figure:
        """Plot differences against tokens, one panel per rival, with 95 % bands."""
        rows, columns = -(-len(self.rivals) // PANELS), min(PANELS, len(self.rivals))
        area = (4.4 * columns, 3.8 * rows + 0.6)
        figure = Figure(figsize=area, layout="constrained", dpi=DPI)
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
        unit, unit_name = unit_for(AXES["tokens"], max(self.horizons))
        pairs = list(zip(self.begun, styles(), strict=False))
        for rival, panel in zip(self.rivals, panels.flat, strict=False):
            for size, style in pairs:
                horizons = sorted(size.study.horizons)
                gaps = [self.difference(size, rival, horizon) for horizon in horizons]
                x = np.array([size.tables.tokens(horizon) for horizon in horizons]) / unit
                mean, low, high = np.array([(gap.mean, gap.low, gap.high) for gap in gaps]).T
                panel.plot(x, mean, marker="o", markersize=3.5, linewidth=1.4, **style)
                is_known = np.isfinite(high - low)
                panel.fill_between(x[is_known], low[is_known], high[is_known],
                                   color=style["color"], alpha=0.15, linewidth=0)  # fmt: skip
            panel.axhline(0, color="0.35", linewidth=0.9, linestyle=":")
            panel.set_title(f"against {self.titles[rival]}", fontsize=10)
            panel.set_xlabel(f"training tokens{unit_name}")
            plain_log(panel, "x")
            panel.set_xlim(0.8 * self.horizons[0] / unit, 1.25 * self.horizons[-1] / unit)
            tidy(panel)
        for panel in panels.flat[len(self.rivals) :]:
            panel.remove()
        for line in panels[:, 0]:
            line.set_ylabel(f"{self.titles[self.subject]} minus it\n(nats per token)")
        titles = [(f"{self.title(size)} (D = {self.width(size)})", style) for size, style in pairs]
        legend(figure, titles, note="at equal tokens and FLOPs; band: 95 % interval")
        return figure


def prediction(sides: Sequence[Difference], widths: Sequence[int]) -> Difference:
    """Extrapolate the difference to the last of three widths, linearly in log(D)."""
    before, last = sides
    step = math.log(widths[2] / widths[1]) / math.log(widths[1] / widths[0])
    parts = [(step * before.error, before.df), ((1 + step) * last.error, last.df)]
    mean = last.mean + step * (last.mean - before.mean)
    n = min(before.n, last.n)
    return of_error(mean, math.hypot(*(error for error, _ in parts)), df=welch(parts), n=n)


def _with_interval(gap: Difference) -> str:
    half = (gap.high - gap.low) / 2
    return number(gap.mean, ".3f") + (f" ± {half:.3f}" if math.isfinite(half) else "")
