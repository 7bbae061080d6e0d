"""Draw losses, heat maps of expert load, and router curves with matplotlib, without a display."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    PercentFormatter,
)

from megatron_smlp.plotting.series import (
    AXES,
    Axis,
    RouterHistory,
    Run,
    common_unit,
    curve,
    has_losses,
    loss_fields,
    router_histories,
    smoothed,
)
from megatron_smlp.routers.collapse import COLLAPSED

# Paul Tol's "muted", which color-blind readers can tell apart, and three more, so that each of a
# study's twelve systems has its own; line styles help where two colors are close. The last one is
# that of the first system that no other study has, often the subject: no gray.
COLORS = (
    "#332288", "#CC6677", "#117733", "#DDAA33", "#88CCEE", "#AA4499", "#882255", "#44AA99",
    "#999933", "#999999", "#000000", "#EE7733",
)  # fmt: skip
STYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))
SMOOTHED = 50  # a curve averages over 1 / SMOOTHED of its points by default
EXTREME = 4.0  # multiple of an even share at which the colors of a heat map end
DPI = 150


def loss_figure(
    runs: Sequence[Run], *, axes: Sequence[str], window: int | None, suffix: bool = False
) -> Figure:
    """Draw the loss of training (lines) and validation (dots) against each of `axes`, from AXES.

    Args:
        window: logged lines that a training curve averages over; None: a fiftieth.
        suffix: draw the loss of targets after a prefix, for runs that have it; else of all targets.
    """
    columns = min(2, len(axes))
    rows = -(-len(axes) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows + 0.6), layout="constrained", dpi=DPI)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(axes) :]:
        panel.remove()
    for name, panel in zip(axes, panels.flat, strict=False):
        _draw_losses(panel, runs, axis=AXES[name], window=window, suffix=suffix)
    for panel in panels[:, 0]:
        panel.set_ylabel(f"loss{' behind the prefix' if suffix else ''} (nats per token)")
    drawn = [has_losses(run, suffix=suffix) for run in runs]
    entries = zip(runs, styles(), drawn, strict=False)
    pairs = [(run.label, style) for run, style, has in entries if any(has)]
    legend(figure, pairs, has_dots=any(has_dots for _, has_dots in drawn))
    return figure


def _draw_losses(
    panel: Axes, runs: Sequence[Run], *, axis: Axis, window: int | None, suffix: bool
) -> None:
    unit, unit_name = common_unit(runs, axis)
    for run, style in zip(runs, styles(), strict=False):
        training, validation = loss_fields(run, suffix=suffix)
        raw = curve(run.training, axis=axis, unit=unit, field=training)
        line = smoothed(raw, window=window or len(raw.y) // SMOOTHED)
        if line is not raw:
            panel.plot(raw.x, raw.y, linewidth=0.4, alpha=0.35, color=style["color"])
        panel.plot(line.x, line.y, linewidth=1.4, **style)
        dots = curve(run.validation, axis=axis, unit=unit, field=validation)
        panel.plot(dots.x, dots.y, "o", color=style["color"], markersize=4, markeredgecolor="white")
    panel.set_xlabel(axis.label.format(unit_name))
    plain_log(panel, "y")
    tidy(panel)


def legend(
    figure: Figure,
    pairs: Sequence[tuple[str, dict[str, Any]]],
    *,
    has_dots: bool = False,
    note: str | None = None,
) -> None:
    """Draw a legend of names and their styles below the panels, where it never covers a curve.

    Args:
        has_dots: whether to explain dots as validations.
        note: the title of the legend.
    """
    handles = [Line2D([], [], linewidth=1.8, label=name, **style) for name, style in pairs]
    if has_dots:
        dots: dict[str, Any] = {"linestyle": "", "marker": "o", "markeredgecolor": "white"}
        handles.append(Line2D([], [], label="validation", color="0.4", **dots))
    inches = 0.6 + 0.075 * max(len(str(handle.get_label())) for handle in handles)
    fitting = max(1, int(figure.get_size_inches()[0] / inches))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), fitting),
        frameon=False, fontsize=9, title=note, title_fontsize=8,
    )  # fmt: skip


def styles() -> Iterator[dict[str, Any]]:
    """Yield the color and the line style of each run."""
    for number in itertools.count():
        turn, place = divmod(number, len(COLORS))
        style = STYLES[(place + turn) % len(STYLES)]  # a color recurs with another style
        yield {"color": COLORS[place], "linestyle": style}


def load_figure(run: Run, *, evaluation: bool = False) -> Figure | None:
    """Draw each expert's load over time, one panel per router; None if the run has no routers."""
    histories = router_histories(run, evaluation=evaluation)
    if not histories:
        return None
    # With routers of both kinds, one row per layer.
    columns = 2 if len({history.kind for history in histories}) > 1 else min(3, len(histories))
    rows = -(-len(histories) // columns)
    figure = Figure(figsize=(4.2 * columns + 1, 2.5 * rows + 0.7), layout="constrained", dpi=DPI)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(histories) :]:
        panel.remove()
    used = panels.flat[: len(histories)]
    for panel, history in zip(used, histories, strict=True):
        mesh = _draw_load(panel, history)
    bar = figure.colorbar(mesh, ax=list(used), extend="both", shrink=0.9)
    bar.set_label("load (multiple of an even share)")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["¼", "½", "1", "2", "4"])
    bar.minorticks_off()
    phase = "validation" if evaluation else "training"
    figure.suptitle(f"{run.label}: expert load in {phase}")
    return figure


def _draw_load(panel: Axes, history: RouterHistory) -> Any:
    """Draw cells that end halfway between logged lines; zero load has the lowest color."""
    load = np.maximum(history.load.T, 1e-3)
    experts = np.arange(load.shape[0] + 1) - 0.5
    norm = LogNorm(1 / EXTREME, EXTREME)
    steps = history.iterations
    middle = (steps[1:] + steps[:-1]) / 2
    first, last = (2 * steps[[0, -1]] - middle[[0, -1]]) if len(middle) else steps[0] + [-0.5, 0.5]
    edges = np.array([first, *middle, last])
    mesh = panel.pcolormesh(edges, experts, load, norm=norm, cmap=colormaps["PuOr_r"])
    mesh.set_rasterized(True)  # a long run's cells are millions, each a path in an SVG or PDF
    panel.set(title=history.title, xlabel="training steps", ylabel="expert")
    panel.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return mesh


def router_figure(runs: Sequence[Run]) -> Figure | None:
    """Draw entropy and drop rate over time: lines for the worst layer, bands for all layers, dots
    for the worst layer in each validation.

    Return None if no run has routers.
    """
    routed = [
        (run, style, histories, router_histories(run, evaluation=True))
        for run, style in zip(runs, styles(), strict=False)
        if (histories := router_histories(run))
    ]
    if not routed:
        return None
    figure = Figure(figsize=(10.4, 4.4), layout="constrained", dpi=DPI)
    entropy, dropped = figure.subplots(1, 2)
    for _, style, *both in routed:
        _draw_worst(entropy, *both, field="entropy", worst=np.nanmin, style=style)
        _draw_worst(dropped, *both, field="drop_rate", worst=np.nanmax, style=style)
    entropy.axhline(COLLAPSED, color="0.35", linewidth=0.9, linestyle=":")
    entropy.annotate(
        "collapse", (0.995, COLLAPSED), xycoords=("axes fraction", "data"), ha="right", va="top",
        color="0.35", fontsize=8, bbox={"color": "white", "pad": 1},
    )  # fmt: skip
    entropy.set(ylabel="entropy of the load (share of log E)", xlabel="training steps")
    dropped.set(ylabel="dropped choices", xlabel="training steps")
    dropped.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    dropped.set_ylim(0, max(dropped.get_ylim()[1], 0.01))
    for panel in (entropy, dropped):
        tidy(panel)
    figure.suptitle("lines: the worst router of a run; bands: all of its routers", fontsize=10)
    has_dots = any(validated for *_, validated in routed)
    legend(figure, [(run.label, style) for run, style, *_ in routed], has_dots=has_dots)
    return figure


def _draw_worst(
    panel: Axes,
    trained: Sequence[RouterHistory],
    validated: Sequence[RouterHistory],
    *,
    field: str,
    worst: Any,
    style: dict[str, Any],
) -> None:
    steps, values = _aligned(trained, field)
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    panel.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
    panel.plot(steps, worst(values, axis=0), linewidth=1.4, **style)
    if validated:  # in which BASE routes greedily and is not balanced
        steps, values = _aligned(validated, field)
        dot = {"color": style["color"], "markersize": 4, "markeredgecolor": "white"}
        panel.plot(steps, worst(values, axis=0), "o", **dot)


def _aligned(histories: Sequence[RouterHistory], field: str) -> tuple[Any, Any]:
    """Return the iterations that any router has, and the values of each, <float>[routers, N], NaN
    where it has none: a rule that may skip may have sent nothing meanwhile."""
    steps = np.unique(np.concatenate([history.iterations for history in histories]))
    values = np.full((len(histories), len(steps)), np.nan)
    for row, history in zip(values, histories, strict=True):
        row[np.searchsorted(steps, history.iterations)] = getattr(history, field)
    return steps, values


def tidy(panel: Axes) -> None:
    """Draw a faint grid behind the curves, and no frame at the top and right."""
    panel.grid(color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def plain_log(panel: Axes, axes: str = "xy") -> None:
    """Make axes logarithmic, with plain numbers even where they span less than a decade."""
    for name in axes:
        panel.set(**{f"{name}scale": "log"})
        axis = panel.xaxis if name == "x" else panel.yaxis
        low, high = axis.get_view_interval()
        round_numbers = MaxNLocator(nbins=8, steps=[1, 2, 5, 10])
        decades = LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0))
        axis.set_major_locator(decades if high > 8 * low else round_numbers)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(FixedLocator([]))
