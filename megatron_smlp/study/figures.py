"""Draw a study: losses of converged points, trials, speed-ups, expert load, kinds of tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_smlp.plotting.figures import DPI, legend, plain_log, styles, tidy
from megatron_smlp.plotting.series import AXES, Floats, unit_for
from megatron_smlp.study.cells import not_reached, speedup
from megatron_smlp.study.measured import Measured
from megatron_smlp.study.metrics import SUFFIX_LOSS, VALIDATION_LOSS
from megatron_smlp.study.rates import Rates
from megatron_smlp.study.state import DIVERGED
from megatron_smlp.study.statistics import paired
from megatron_smlp.study.verdicts import SECONDS, Comparison

FIELDS = {VALIDATION_LOSS: "", SUFFIX_LOSS: " behind the prefix"}
PANELS = {
    "position": "position in the window",
    "frequency": "frequency of the token (1: the most frequent fifth)",
    "repeat": "what the token repeats of its window",
}
ALWAYS_ALIKE = (
    *("transformer", "switch", "gshard", "base", "hash", "gmlp", "amlp"),
    *("smlp_deterministic", "smlp_partial"),
    *("gmlp_token_moe", "feature_moe_only", "smlp_2_experts"),  # micro's ablations
)
LEAST_LOAD = 0.01  # of an even share: the lower end of the logarithmic axis
MANY_LABELS = 8  # on an axis: more would touch unless rotated
ENOUGH_FOR_BANDS = 3  # seeds: the interval of two is wider than any figure


class Drawing:
    """The figures of one study; a system has the same style in all of them."""

    def __init__(self, measured: Measured, factors: Mapping[str, float]) -> None:
        self.measured = measured
        self.study, self.systems, self.tables = measured.study, measured.systems, measured.tables
        self.factors = factors
        self.styles = _styles(self.systems)
        self.styles[self.study.subject]["zorder"] = 3  # on top of the others
        self.run_word, self.mean_word, self.interval_words = (
            ("rate", "fitted minimum", "its 95 % interval")
            if self.study.design
            else ("seed", "mean", f"95 % interval of the mean, of {ENOUGH_FOR_BANDS} seeds or more")
        )

    def figures(self, speedups: Sequence[Comparison]) -> Iterator[tuple[str, Figure]]:
        asked = (VALIDATION_LOSS, self.measured.field(*self.systems))
        for field, what in FIELDS.items():
            if field in asked and self.tables.converged[field].notna().any():
                yield f"loss{what.replace(' ', '-')}", self.losses(field, what)
        if len(self._trials()):
            yield "learning-rates", self.learning_rates()
        is_known = any(math.isfinite(comparison.difference.mean) for comparison in speedups)
        if is_known and len(self.study.horizons) > 1:
            yield "speed-up", self.speedups(speedups)
        if loads := {name: own for name in self.styles if len(own := self._evaluated_loads(name))}:
            yield "expert-load", self.load(loads)
        if kinds := [kind for kind in PANELS if self.tables.labels(kind)]:
            yield "where-the-loss-lies", self.breakdown(kinds)

    def losses(self, field: str, what: str) -> Figure:
        """Plot the converged points against tokens, FLOPs and, where it was measured, time.

        A study with one horizon has no curves: its losses are plotted system by system.
        """
        if len(self.study.horizons) == 1:
            return self._losses_at_the_end(field, what)
        axes = self._axes()
        figure = Figure(figsize=(4.4 * len(axes), 4.4), layout="constrained", dpi=DPI)
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        names = self.measured.trained_on(field)
        for panel, (label, scale) in zip(panels, axes.items(), strict=True):
            for name in names:
                self._draw_seeds(panel, name, field, scale(name))
            limits = panel.get_ylim()  # Keep those of the seeds: bands may be much wider.
            for name in names:
                self._draw_band(panel, name, field, scale(name))
            panel.set_ylim(limits)
            panel.set_xlabel(label)
            plain_log(panel)
            tidy(panel)
        panels[0].set_ylabel(f"validation loss{what}\n(nats per token)")
        there = [name for name in names if self.tables.seeds(name)]
        note = f"thin: each {self.run_word}; thick: {self.mean_word}; band: {self.interval_words}"
        self._legend(figure, f"{note}, cut where it leaves the panel", there)
        return figure

    def _losses_at_the_end(self, field: str, what: str) -> Figure:
        at_end = self.measured.at_end(field)
        means = {name: at_end.mean(name).mean for name in self.measured.trained_on(field)}
        names = sorted(means, key=lambda name: (math.isnan(means[name]), means[name]))
        figure, panel = _single(7.4, 1.2 + 0.4 * len(names))
        for line, name in enumerate(names):
            color = self.styles[name]["color"]
            losses = list(self.tables.losses(name, self.study.longest, field).values())
            panel.plot(losses, [line] * len(losses), "o", markersize=3.5, alpha=0.6, color=color)
            for _, mean, low, high in self._means(name, field):
                panel.plot([mean], [line], "|", markersize=14, color=color)
                panel.plot([low, high], [line, line], linewidth=2, color=color)
        labels = panel.set_yticks(range(len(names)), [self.systems[name].title for name in names])
        if self.study.subject in names:  # absent if its losses cover another part of the window
            labels[names.index(self.study.subject)].label1.set_fontweight("bold")
        panel.invert_yaxis()  # the lowest loss on top
        panel.set_xlabel(f"validation loss{what} (nats per token)")
        panel.set_title(
            f"dots: each {self.run_word}; stroke: {self.mean_word}; line: {self.interval_words}",
            fontsize=9,
        )
        tidy(panel)
        return figure

    def _axes(self) -> dict[str, Callable[[str], float]]:
        """Map the label of each x-axis to a function from a system to its factor from tokens."""
        longest = self.study.longest
        tokens, token_name = unit_for(AXES["tokens"], longest)
        flops = {
            name: 3e12 / 1024 * system.costs["forward_tflops_per_1024_tokens"]
            for name, system in self.systems.items()
        }
        size, prefix = unit_for(AXES["flops"], longest * min(flops.values()))
        axes: dict[str, Callable[[str], float]] = {
            f"training tokens{token_name}": lambda _: 1 / tokens,
            f"training compute, full squares ({prefix}FLOPs)": lambda name: flops[name] / size,
        }
        if self.tables.has_speed(*self.systems):
            seconds = self.tables.seconds_per_token
            least = longest * min(map(seconds, self.systems))
            duration, word = unit_for(AXES["time"], least)
            axes[f"training time on a quiet machine ({word})"] = lambda name: (
                seconds(name) / duration
            )
        return axes

    def _draw_seeds(self, panel: Axes, name: str, field: str, scale: float) -> None:
        style = self.styles[name]
        for seed in self.tables.seeds(name):
            tokens, losses = self.tables.curve(name, seed, field)
            width = self._width(name, 0.6)
            panel.plot(np.array(tokens) * scale, losses, linewidth=width, alpha=0.6, **style)
        points = self._means(name, field)
        x, mean = points[:, 0] * scale, points[:, 1]
        panel.plot(x, mean, linewidth=self._width(name, 1.6), **style)
        panel.plot(x, mean, "o", markersize=3.5, color=style["color"])

    def _width(self, name: str, others: float) -> float:
        """Return the width of a system's line: `others`, doubled for the subject."""
        return 2 * others if name == self.study.subject else others

    def _draw_band(self, panel: Axes, name: str, field: str, scale: float) -> None:
        points = self._means(name, field)
        color = self.styles[name]["color"]
        x, low, high = points[:, 0] * scale, points[:, 2], points[:, 3]
        panel.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)

    def _means(self, name: str, field: str) -> Floats:
        """Return <float64>[horizons, 4]: tokens, the mean over seeds or minimum over rates, and the
        ends of its interval; horizons that diverged are left out."""
        points = []
        for horizon in sorted(self.study.horizons):
            estimate = self.measured.at(horizon, field).mean(name)
            if math.isfinite(estimate.mean):
                is_enough = estimate.n >= ENOUGH_FOR_BANDS and math.isfinite(estimate.high)
                ends = (estimate.low, estimate.high) if is_enough else (math.nan, math.nan)
                points.append((self.tables.tokens(horizon), estimate.mean, *ends))
        return np.array(points, dtype=np.float64).reshape(-1, 4)

    def _trials(self) -> pandas.DataFrame:
        """Return the runs at several rates: the trials or, for a design, its longest runs."""
        if self.study.design is None:
            return self.tables.trials
        runs = self.tables.converged
        return runs[runs["horizon"] == self.study.longest]

    def learning_rates(self) -> Figure:
        """Plot all trials of the learning rate, with a ring around the chosen one or, for a design,
        the fitted minimum.

        Trials of systems with partial prediction show the loss behind the prefix, and say so.
        """
        figure, panel = _single(7.4, 5.2)
        trials = self._trials()
        names = [name for name in self.styles if name in set(trials["system"])]
        for name in names:
            style = self.styles[name]
            own = trials[trials["system"] == name].sort_values("factor")
            finite = own[np.isfinite(own["loss"].astype(float))]
            width = self._width(name, 1.3)
            panel.plot(
                finite["lr"], finite["loss"], marker="o", markersize=3.5, linewidth=width, **style
            )
            panel.plot(
                *self._chosen(name, finite), "o", markersize=9, fillstyle="none",
                color=style["color"],
            )  # fmt: skip
            for rate in own[own["status"] == DIVERGED]["lr"]:
                panel.plot(
                    rate, 1, "x", color=style["color"], transform=panel.get_xaxis_transform()
                )
        panel.set(
            xlabel="peak learning rate", ylabel="validation loss of the trial (nats per token)"
        )
        plain_log(panel, "x")
        tidy(panel)
        note = "every trial; ring: chosen, or fitted minimum; cross at the top: diverged"
        labels = {
            name: f"{system.title} (behind the prefix)"
            for name, system in self.systems.items()
            if system.predicts_suffix
        }
        self._legend(figure, note, names, labels=labels)
        return figure

    def _chosen(self, name: str, trials: pandas.DataFrame) -> tuple[Sequence[float], ...]:
        """Return the chosen rate and its loss, as lists of at most one item."""
        fit = self.measured.at_end(self.measured.field(name))
        if isinstance(fit, Rates):
            rate, estimate = self.systems[name].flags["lr"] * fit.best(name), fit.mean(name)
            return [rate], [estimate.mean]
        # The CSV files round factors.
        chosen = trials[np.isclose(trials["factor"], self.factors.get(name, math.nan))]
        return list(chosen["lr"]), list(chosen["loss"])

    def speedups(self, comparisons: Sequence[Comparison]) -> Figure:
        """Plot the subject's speed-up to the final loss of each other system."""
        shown = [comparison for comparison in comparisons if comparison.difference.n]
        figure, panel = _single(6.8, 0.5 * len(shown) + 1.8)
        for place, comparison in enumerate(reversed(shown)):
            mean, low, high = speedup(comparison)
            color = self.styles[comparison.rival]["color"]
            if comparison.unreached:
                panel.text(
                    0.01, place, not_reached(comparison), fontsize=8, va="center",
                    transform=panel.get_yaxis_transform(),
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )  # fmt: skip
                continue
            panel.plot([mean], [place], "o", color=color)
            if math.isfinite(high) and low and not comparison.is_bound:
                panel.plot([low, high], [place, place], color=color, linewidth=2)
            panel.annotate(
                f"{'at least ' * comparison.is_bound}{mean:.2f}", (mean, place), xytext=(0, 6),
                textcoords="offset points", fontsize=8, ha="center",
            )  # fmt: skip
        titles = [self.systems[comparison.rival].title for comparison in reversed(shown)]
        panel.set_yticks(range(len(shown)), labels=titles)
        panel.set_ylim(-0.6, len(shown) - 0.3)
        panel.axvline(1, color="0.35", linewidth=0.9, linestyle=":")
        unit = "time" if comparisons[0].what == SECONDS else "tokens (not of time)"
        panel.set_xlabel(
            f"speed-up of {self.systems[self.study.subject].title} to each system's final loss, "
            f"in {unit}\n(1: equal; line: 95 % interval)"
        )
        plain_log(panel, "x")
        tidy(panel)
        return figure

    def _evaluated_loads(self, name: str) -> pandas.DataFrame:
        lines = self.tables.loads(name, self.study.longest)
        return lines[lines[VALIDATION_LOSS].notna()]

    def load(self, loads: Mapping[str, pandas.DataFrame]) -> Figure:
        """Plot the highest and lowest load of any expert in the evaluations."""
        figure, panel = _single(7.4, 4.6)
        unit, unit_name = unit_for(AXES["tokens"], self.study.longest)
        for name, lines in loads.items():
            mean = lines.groupby("tokens")[["load_min", "load_max"]].mean()
            mean = mean.clip(lower=LEAST_LOAD)  # a logarithm of zero would hide the emptiest
            for field, width in (("load_max", 1.6), ("load_min", 0.8)):
                width = self._width(name, width)
                panel.plot(mean.index / unit, mean[field], linewidth=width, **self.styles[name])
        panel.axhline(1, color="0.35", linewidth=0.9, linestyle=":")
        panel.set(
            xlabel=f"training tokens{unit_name}", ylabel="load in evaluations (1: an even share)"
        )
        plain_log(panel, "y")
        panel.set_ylim(bottom=LEAST_LOAD / 1.2)  # the axis itself would hide a line
        tidy(panel)
        note = "thick: the fullest expert of any layer; thin: the emptiest "
        note += f"({LEAST_LOAD:g}: or less); mean of seeds"
        self._legend(figure, note, list(loads))
        return figure

    def breakdown(self, kinds: Sequence[str]) -> Figure:
        """Plot each kind of token's loss minus the subject's on the same seeds, for the systems
        that share the most seeds with it: those with fewer would differ by their seeds as well."""
        figure = Figure(figsize=(4.6 * len(kinds), 4.4), layout="constrained", dpi=DPI)
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        first = self.study.subject
        common = {
            name: self._looked_at(kinds[0], name) & self._looked_at(kinds[0], first)
            for name in self.measured.trained_on(VALIDATION_LOSS)
        }
        most = max((len(seeds) for name, seeds in common.items() if name != first), default=0)
        there = [name for name, seeds in common.items() if name == first or len(seeds) == most > 0]
        for panel, kind in zip(panels, kinds, strict=True):
            labels = self.tables.labels(kind)
            for name in there:
                points = [self._against(first, name, kind, label) for label in labels]
                style = self.styles[name]
                width = self._width(name, 1.3)
                panel.plot(
                    range(len(labels)), points, marker="o", markersize=3.5, linewidth=width, **style
                )
            turned = 30 if len(labels) > MANY_LABELS else 0
            panel.set_xticks(range(len(labels)), labels=labels, fontsize=8, rotation=turned)
            panel.set_xlabel(PANELS[kind])
            tidy(panel)
        title = self.systems[first].title
        panels[0].set_ylabel(f"loss minus that of\n{title} (nats per token)")
        note = f"final checkpoints, mean of {most} seeds; above 0: a higher loss than {title}"
        self._legend(figure, note, there)
        return figure

    def _looked_at(self, kind: str, name: str) -> set[int]:
        """Return the seeds of a system whose final checkpoints have this breakdown."""
        return set(self.tables.values(kind, self.tables.labels(kind)[0], name))

    def _against(self, first: str, name: str, kind: str, label: str) -> float:
        sides = [self.tables.values(kind, label, system) for system in (name, first)]
        return paired(*sides).mean

    def _legend(
        self,
        figure: Figure,
        note: str,
        names: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        titles = {name: system.title for name, system in self.systems.items()} | dict(labels or {})
        pairs = [(titles[name], self.styles[name]) for name in names or self.systems]
        legend(figure, pairs, note=note)


def _single(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    return figure, figure.subplots()


def _styles(names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return a style per system. Those in ALWAYS_ALIKE have the same one in every study; others use
    the styles of those that are absent, from the last on."""
    every = styles()
    own = dict(zip(ALWAYS_ALIKE, every, strict=False))
    absent = [style for name, style in own.items() if name not in names]
    free = itertools.chain(reversed(absent), every)
    return {name: own[name] if name in own else next(free) for name in names}
