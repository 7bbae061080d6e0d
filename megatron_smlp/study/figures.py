"""Draw a study: losses of converged points, evaluation curves, trials, speed-ups, expert load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_smlp.plotting.figures import DPI, looks, tidy
from megatron_smlp.study.state import DIVERGED
from megatron_smlp.study.statistics import interval
from megatron_smlp.study.study_file import Study
from megatron_smlp.study.systems import System
from megatron_smlp.study.tables import Tables
from megatron_smlp.study.verdicts import SECONDS, Comparison

FIELDS = {"validation_loss": "", "validation_suffix_loss": " behind the prefix"}
Look = Mapping[str, Any]


class Drawing:
    """The figures of one study, with one look for each system in all of them."""

    def __init__(self, study: Study, systems: Mapping[str, System], tables: Tables) -> None:
        self.study = study
        self.systems = systems
        self.tables = tables
        self.looks = dict(zip(systems, looks(), strict=False))

    def figures(self, speedups: Sequence[Comparison]) -> Iterator[tuple[str, Figure]]:
        """Yield name and figure of all that there is to draw."""
        for field, what in FIELDS.items():
            if self.tables.converged[field].notna().any():
                yield f"loss{what.replace(' ', '-')}", self.losses(field, what)
        if len(self.tables.evaluations(list(self.tables.runs["key"]))):
            yield "evaluations", self.evaluations()
        if (self.tables.runs["phase"] == "tuning").any():
            yield "learning-rates", self.learning_rates()
        if any(math.isfinite(each.found.mean) for each in speedups):
            yield "speed-up", self.speedups(speedups)
        if self.tables.curves["load_max"].notna().any():
            yield "expert-load", self.load()

    def losses(self, field: str, what: str) -> Figure:
        """Draw the converged points against tokens, FLOPs and, where it was measured, time."""
        axes: dict[str, Callable[[str], float]] = {
            "training tokens (millions)": lambda _: 1e-6,
            "training compute, full squares (PFLOPs)": self._petaflops_per_token,
        }
        if self.tables.has_speed(*self.systems):
            axes["training time, quiet machine (minutes)"] = lambda name: (
                self.tables.seconds_per_token(name) / 60
            )
        figure = Figure(figsize=(4.4 * len(axes), 4.4), layout="constrained", dpi=DPI)
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, (label, scale) in zip(panels, axes.items(), strict=True):
            for name in self.systems:
                self._draw_seeds(panel, name, field, scale(name))
            panel.set_xlabel(label)
            _plain_log(panel)
            tidy(panel)
        panels[0].set_ylabel(f"validation loss{what} (nats per token)")
        self._legend(figure, "thin: each seed; thick: mean; band: 95 % interval of the mean")
        return figure

    def _petaflops_per_token(self, name: str) -> float:
        per_1024 = self.systems[name].costs["forward_tflops_per_1024_tokens"]
        return float(3 * per_1024 / 1024 / 1e3)

    def _draw_seeds(self, panel: Axes, name: str, field: str, scale: float) -> None:
        look = self.looks[name]
        for seed in self.tables.seeds(name):
            tokens, losses = self.tables.curve(name, seed, field)
            panel.plot(np.array(tokens) * scale, losses, linewidth=0.6, alpha=0.6, **look)
        points = []
        for horizon in sorted(self.study.horizons):
            found = list(self.tables.losses(name, horizon, field).values())
            finite = [loss for loss in found if math.isfinite(loss)]
            if finite and len(finite) == len(found):
                low, high = interval(finite) if len(finite) > 1 else (math.nan, math.nan)
                points.append((horizon * scale, float(np.mean(finite)), low, high))
        if points:
            x, mean, low, high = np.array(points).T
            panel.plot(x, mean, "o", linewidth=2, markersize=3.5, color=look["color"])
            panel.plot(x, mean, linewidth=2, **look)
            limits = panel.get_ylim()
            panel.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
            if len(self.tables.seeds(name)) < 3:  # an interval of two seeds is wider than the plot
                panel.set_ylim(limits)

    def evaluations(self) -> Figure:
        """Draw every evaluation of the trunks, and of the decays that leave them."""
        figure = Figure(figsize=(7.4, 4.8), layout="constrained", dpi=DPI)
        panel = figure.subplots()
        runs = self.tables.runs[self.tables.runs["phase"] == "main"]
        for name, look in self.looks.items():
            own = runs[runs["system"] == name]
            for _, seed_runs in own.groupby("seed"):
                trunk = seed_runs[
                    seed_runs["horizon"].isna() | (seed_runs["end"] == own["end"].max())
                ]
                lines = self.tables.evaluations(list(trunk["key"]))
                panel.plot(lines["tokens"] / 1e6, lines["validation_loss"], linewidth=1, **look)
            ends = own[own["horizon"].notna()]
            panel.plot(
                ends["tokens"] / 1e6, ends["validation_loss"], "o", markersize=4,
                color=look["color"], markeredgecolor="white",
            )  # fmt: skip
        panel.set(xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
        _plain_log(panel)
        tidy(panel)
        self._legend(figure, "lines: constant learning rate, then the last decay; dots: decayed")
        return figure

    def learning_rates(self) -> Figure:
        """Draw all trials of the learning rate; a ring is around the chosen one."""
        figure = Figure(figsize=(6.4, 4.6), layout="constrained", dpi=DPI)
        panel = figure.subplots()
        trials = self.tables.runs[self.tables.runs["phase"] == "tuning"]
        for name, look in self.looks.items():
            own = trials[trials["system"] == name].sort_values("factor")
            finite = own[np.isfinite(own["loss"].astype(float))]
            panel.plot(finite["lr"], finite["loss"], marker="o", markersize=3.5, **look)
            if len(finite):
                best = finite.loc[finite["loss"].idxmin()]
                panel.plot(
                    best["lr"], best["loss"], "o", markersize=9, fillstyle="none",
                    color=look["color"],
                )  # fmt: skip
            for rate in own[own["status"] == DIVERGED]["lr"]:
                panel.plot(rate, 1, "x", color=look["color"], transform=panel.get_xaxis_transform())
        panel.set(
            xlabel="peak learning rate", ylabel="validation loss of the trial (nats per token)"
        )
        panel.set_xscale("log")
        rates = sorted(set(trials["lr"]))
        panel.xaxis.set_major_locator(FixedLocator(rates))
        panel.xaxis.set_minor_locator(FixedLocator([]))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        tidy(panel)
        self._legend(figure, "every trial; ring: chosen; cross at the top: diverged")
        return figure

    def speedups(self, comparisons: Sequence[Comparison]) -> Figure:
        """Draw how many times sooner the subject comes to the loss at which each other one ends."""
        shown = [each for each in comparisons if each.found.n]
        figure = Figure(figsize=(6.8, 0.5 * len(shown) + 1.8), layout="constrained", dpi=DPI)
        panel = figure.subplots()
        for place, each in enumerate(reversed(shown)):
            mean, low, high = speedup(each)
            color = self.looks[each.other]["color"]
            panel.barh(place, mean, height=0.55, color=color, alpha=0.75)
            if math.isfinite(high):
                panel.plot([low, high], [place, place], color="0.15", linewidth=1.4)
            text = f"{mean:.2f} x" if mean else "not reached"
            panel.annotate(
                text, (mean, place), xytext=(6, 8), textcoords="offset points", fontsize=8,
            )  # fmt: skip
        panel.set_yticks(range(len(shown)), labels=[each.other for each in reversed(shown)])
        panel.axvline(1, color="0.35", linewidth=0.9, linestyle=":")
        unit = "time" if comparisons[0].what == SECONDS else "tokens (not time)"
        panel.set_xlabel(f"times less {unit} of {self.study.subject} to the loss of each; 1: equal")
        panel.set_xlim(0, panel.get_xlim()[1] * 1.12)
        tidy(panel)
        return figure

    def load(self) -> Figure:
        """Draw the greatest and the least load of any expert in the evaluations."""
        figure = Figure(figsize=(7.4, 4.6), layout="constrained", dpi=DPI)
        panel = figure.subplots()
        runs = self.tables.runs[self.tables.runs["phase"] == "main"]
        drawn = []
        for name, look in self.looks.items():
            own = runs[runs["system"] == name]
            own = own[own["horizon"].isna() | (own["end"] == own["end"].max())]
            lines = self.tables.evaluations(list(own["key"]))
            lines = lines[lines["load_max"].notna()]
            if len(lines):
                drawn.append(name)
                mean = lines.groupby("tokens")[["load_min", "load_max"]].mean()
                panel.plot(mean.index / 1e6, mean["load_max"], linewidth=1.6, **look)
                panel.plot(mean.index / 1e6, mean["load_min"], linewidth=0.8, **look)
        panel.axhline(1, color="0.35", linewidth=0.9, linestyle=":")
        panel.set(
            xlabel="training tokens (millions)", ylabel="load in evaluations (1: an even share)"
        )
        panel.set_ylim(bottom=0)
        tidy(panel)
        self._legend(
            figure,
            "thick: the fullest expert of any layer; thin: the emptiest; mean of seeds",
            drawn,
        )
        return figure

    def _legend(self, figure: Figure, note: str, names: Sequence[str] = ()) -> None:
        handles = [
            Line2D([], [], linewidth=1.8, label=name, **self.looks[name])
            for name in names or self.systems
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(5, len(handles)),
            frameon=False, fontsize=9, title=note, title_fontsize=8,
        )  # fmt: skip


def speedup(comparison: Comparison) -> tuple[float, float, float]:
    """Return the inverse of a ratio of costs, and its interval; 0: never reached."""
    found = comparison.found
    return _inverse(found.mean), _inverse(found.high), _inverse(found.low)


def _inverse(value: float) -> float:
    if math.isnan(value):
        return math.nan
    if math.isinf(value):
        return 0.0
    return 1 / value if value else math.inf


def _plain_log(panel: Axes) -> None:
    """Make both axes logarithmic, with round numbers: losses span less than a decade."""
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_minor_locator(FixedLocator([]))
