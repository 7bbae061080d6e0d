"""Draw costs against sizes: measured and expected points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from megatron_smlp.plotting.figures import DPI, styles, tidy


@dataclass(frozen=True)
class Growth:
    """One line: its sizes, ascending and above 0, and a cost for each."""

    sizes: Sequence[float]
    measured: Sequence[float]
    expected: Sequence[float]

    def exponent(self, *, expected: bool = False) -> float:
        """Return p of cost = a size^p, by least squares over logarithms."""
        costs = self.expected if expected else self.measured
        return float(np.polyfit(np.log(self.sizes), np.log(costs), 1)[0])


@dataclass(frozen=True)
class Sweep:
    """One panel."""

    size: str
    cost: str
    lines: Mapping[str, Growth]


def scaling_figure(sweeps: Sequence[Sweep]) -> Figure:
    """Draw one panel per sweep, both axes logarithmic: dots measured, dashes expected."""
    figure = Figure(figsize=(4.6 * len(sweeps), 4.4), layout="constrained", dpi=DPI)
    panels = figure.subplots(1, len(sweeps), squeeze=False)[0]
    labels = list(dict.fromkeys(label for sweep in sweeps for label in sweep.lines))
    colors = {label: style["color"] for label, style in zip(labels, styles(), strict=False)}
    for sweep, panel in zip(sweeps, panels, strict=True):
        for label, line in sweep.lines.items():
            color = colors[label]
            panel.plot(line.sizes, line.measured, "o-", color=color, linewidth=1.4, markersize=4)
            panel.plot(line.sizes, line.expected, "--", color=color, linewidth=1.0)
        panel.set(xscale="log", yscale="log", xlabel=sweep.size, ylabel=sweep.cost)
        sizes = sorted({size for line in sweep.lines.values() for size in line.sizes})
        panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
        panel.xaxis.minorticks_off()
        tidy(panel)
    handles = [
        panels[0].plot([], [], "o-", color=colors[label], markersize=4)[0] for label in labels
    ]
    handles.append(panels[0].plot([], [], "--", color="0.4", linewidth=1.0)[0])
    figure.legend(
        handles,
        [*labels, "expected"],
        loc="outside lower center",
        ncols=min(6, 2 * len(sweeps)),
        frameon=False,
    )
    return figure
