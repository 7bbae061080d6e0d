"""The data behind the figures, from metrics.jsonl: loss curves and router histories.

Letters: S logged lines, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.errors import UsageError
from megatron_smlp.metrics_records import FILE_NAME, Record, read_records

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    label: str
    training: list[Record]
    """Lines with a `loss`, one per iteration, ascending."""
    validation: list[Record]
    """Lines with a `validation_loss`, likewise."""


def read_runs(paths: Sequence[Path], *, labels: Sequence[str] | None = None) -> list[Run]:
    """Read the runs in these folders or files.

    Args:
        labels: one per run; default: the part in which their paths differ.

    Raises:
        UsageError: the number of labels is wrong, or `read_run` raises it.
    """
    names = list(labels) if labels else default_labels(paths)
    if len(names) != len(paths):
        raise UsageError(f"--labels {' '.join(names)}: give one for each of the {len(paths)} runs.")
    return [read_run(path, label=label) for path, label in zip(paths, names, strict=True)]


def default_labels(paths: Sequence[Path]) -> list[str]:
    """Return the part in which paths differ: `switch` and `base` for `switch/log base/log`."""
    folders = [(path.parent if path.suffix == ".jsonl" else path).resolve() for path in paths]
    for part in range(1, max(len(folder.parts) for folder in folders)):
        names = [folder.parts[-part] if part < len(folder.parts) else "" for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_run(path: Path, *, label: str) -> Run:
    """Read one run.

    Raises:
        UsageError: there is no such file, a line is not a record, or no step is recorded.
    """
    file = path / FILE_NAME if path.is_dir() else path
    present = read_records(file)
    training, validation = (_by_iteration(present, name) for name in ("loss", "validation_loss"))
    if not training:
        raise UsageError(f"{file}: no training step is recorded: nothing to draw.")
    return Run(label, training, validation)


def _by_iteration(records: Sequence[Record], name: str) -> list[Record]:
    """Return the records that have this field, the last one of each iteration."""
    return list({record["iteration"]: record for record in records if name in record}.values())


def number(record: Record, name: str) -> float:
    """Return a field as a number, also from a text such as "nan"; NaN if it is missing."""
    value = record.get(name)
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Axis:
    """A quantity that a loss is drawn against."""

    field: str
    """Its name in metrics.jsonl."""
    label: str
    """Its name under the axis, with a placeholder for the unit's."""
    units: tuple[tuple[float, str], ...] = ((1.0, ""),)
    """Size, in the field's own unit, and name of each unit; ascending."""


FLOPS = ((1e9, "G"), (1e12, "T"), (1e15, "P"), (1e18, "E"), (1e21, "Z"))
AXES = {
    "steps": Axis("iteration", "training steps"),
    "tokens": Axis(
        "consumed_tokens",
        "training tokens{}",
        ((1.0, ""), (1e3, " (thousands)"), (1e6, " (millions)"), (1e9, " (billions)")),
    ),
    "flops": Axis("consumed_flops", "training compute, needed ({}FLOPs)", FLOPS),
    "square-flops": Axis(
        "consumed_square_flops", "training compute, full squares ({}FLOPs)", FLOPS
    ),
    "time": Axis(
        "wall_seconds",
        "wall time ({})",
        ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86400.0, "days")),
    ),
}


def loss_fields(run: Run, *, suffix: bool) -> tuple[str, str]:
    """Return the training and validation fields that have a run's losses over all targets, or over
    those after a prefix.

    A step's `loss` is over the targets trained on. With partial prediction these are the suffix,
    and its lines also have a `whole_loss`.
    """
    if suffix:
        return "suffix_loss", "validation_suffix_loss"
    has_whole = any("whole_loss" in record for record in run.training)
    return "whole_loss" if has_whole else "loss", "validation_loss"


def has_losses(run: Run, *, suffix: bool) -> tuple[bool, bool]:
    """Return whether there are training losses, and validation losses, to draw."""
    training, validation = loss_fields(run, suffix=suffix)
    trained = any(training in record for record in run.training)
    return trained, any(validation in record for record in run.validation)


def common_unit(runs: Sequence[Run], axis: Axis) -> tuple[float, str]:
    """Return the largest unit that the largest value of the runs reaches."""
    values = [number(record, axis.field) for run in runs for record in run.training]
    return unit_for(axis, max((value for value in values if np.isfinite(value)), default=0.0))


def unit_for(axis: Axis, largest: float) -> tuple[float, str]:
    """Return the largest unit that `largest` reaches, else the smallest."""
    return [axis.units[0], *(unit for unit in axis.units if largest >= unit[0])][-1]


@dataclass(frozen=True)
class Curve:
    """<float64>[S] each; a point whose x or y is not finite is left out."""

    x: Floats
    y: Floats


def curve(records: Sequence[Record], *, axis: Axis, unit: float, field: str) -> Curve:
    """Return a field of these records against the axis, whose values are divided by `unit`."""
    x = np.array([number(record, axis.field) for record in records]) / unit
    y = np.array([number(record, field) for record in records])
    finite = np.isfinite(x) & np.isfinite(y)
    return Curve(x[finite], y[finite])


def smoothed(line: Curve, *, window: int) -> Curve:
    """Return the running mean over the last `window` points, over fewer at the start."""
    if window < 2 or not len(line.y):
        return line
    sums = np.concatenate(([0.0], np.cumsum(line.y)))
    end = np.arange(1, len(line.y) + 1)
    start = np.maximum(0, end - window)
    return Curve(line.x, (sums[end] - sums[start]) / (end - start))


@dataclass(frozen=True)
class RouterHistory:
    layer: int
    kind: str
    iterations: Floats
    """<float64>[S]."""
    load: Floats
    """<float64>[S, E], each expert's share times E: 1 is even."""
    entropy: Floats
    """<float64>[S], as a fraction of log E."""
    drop_rate: Floats
    """<float64>[S]."""

    @property
    def title(self) -> str:
        return f"layer {self.layer}, {self.kind} router"


def router_histories(run: Run, *, evaluation: bool = False) -> list[RouterHistory]:
    """Return the history of each router of a run, in training or validation, in layer order."""
    records = run.validation if evaluation else run.training
    field = "validation_routers" if evaluation else "routers"
    by_layer: dict[tuple[int, str], list[tuple[int, Record]]] = {}
    for record in records:
        for router in record.get(field, []):
            key = (router["layer"], router["kind"])
            by_layer.setdefault(key, []).append((record["iteration"], router))
    histories = []
    for (layer, kind), lines in sorted(by_layer.items()):
        shares = np.array([router["load_share"] for _, router in lines])
        histories.append(
            RouterHistory(
                layer=layer,
                kind=kind,
                iterations=np.array([iteration for iteration, _ in lines], dtype=np.float64),
                load=shares * shares.shape[1],
                entropy=np.array([number(router, "entropy") for _, router in lines]),
                drop_rate=np.array([number(router, "drop_rate") for _, router in lines]),
            )
        )
    return histories
