"""The reference for a run on the device: the same run on the CPU, and what rounding does to it.

The CPU trains in bf16 and in fp32, from the same weights. How far the two lie apart, quantity by
quantity, is bf16's rounding, including near-ties between experts that resolve differently.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support.first_gpu.notes import Notes, Place, largest_difference
from support.first_gpu.training import (
    NUM_STEPS,
    STARTS,
    Around,
    Gradients,
    first_gradients,
    from_seed,
    make_seed,
    no_context,
    run_flags,
    saving,
    train,
)
from support.launches import Step

ALLOWED = 3
"""Factor on the CPU's rounding; independent roundings are 1.4 times as far apart as either is from
the truth. Measured for bf16 runs from weights that differ in their last place: at most 1.6 times,
in all groups of seven systems at T = 1024."""
BF16 = 2**-9
"""Largest relative error of one rounding to bf16."""
GROUPS = {
    "M": r"spatial\.weight$",
    "b": r"spatial\.bias$",
    "experts": r"\.experts\.",
    "routers": r"\.router\.",
    "norms": r"norm[._]",
    "embeddings": r"embedding|output_layer",
    "attention": r"linear_qkv|linear_proj|tiny_attention",
    "projections": "",
}
"""Group -> pattern in its parameters' names; the first group that matches counts."""
PRECISIONS = {"bf16": "--bf16", "fp32": ""}


@dataclass(frozen=True)
class Run:
    """A run's steps, and the gradients of the first one."""

    steps: list[Step]
    gradients: Gradients


@dataclass(frozen=True)
class Reference:
    """The CPU's run in bf16, and its distance from that in fp32."""

    run: Run
    rounding: dict[str, float]

    def write(self, folder: Path) -> None:
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        steps = [asdict(step) for step in self.run.steps]
        torch.save((steps, self.run.gradients, self.rounding), folder / "reference.pt")

    @classmethod
    def read(cls, place: Place, name: str) -> Reference | None:
        """Read that of a system, or of a start of layouts; None if its case left none."""
        import torch

        path = place.folder / "reference" / name / "reference.pt"
        if not path.is_file():
            return None
        steps, gradients, rounding = torch.load(path)
        return cls(Run([Step(**step) for step in steps], gradients), rounding)


def saved_run(flags: str, folder: Path, *, around: Around = no_context) -> Run:
    """Train, and save after each step; the checkpoints stay."""
    steps = train(saving(flags, folder), folder / "log", around=around)
    return Run(steps, first_gradients(folder))


def forget_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def reference(place: Place, notes: Notes, *, name: str) -> None:
    """Train a system, or what layouts start from, on the CPU in both precisions."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if name in STARTS:
        make_seed(place, name)
    folder, runs = place.folder / "reference" / name, {}
    for precision, flag in PRECISIONS.items():
        if name in STARTS:
            flags = from_seed(place, name, precision=flag)
        else:
            flags = run_flags(place, name, precision=flag)
        runs[precision] = saved_run(flags, folder / precision)
        forget_checkpoints(folder / precision)
    rounding = unless_by_chance(distances(runs["bf16"], runs["fp32"]), place.tokens)
    Reference(runs["bf16"], rounding).write(folder)
    notes.data["rounding"] = rounding
    said = ", ".join(f"{quantity} {distance:.1e}" for quantity, distance in rounding.items())
    notes.check(len(runs["bf16"].steps) == NUM_STEPS, f"bf16 from fp32, relative: {said}")


def unless_by_chance(rounding: dict[str, float], tokens: int) -> dict[str, float]:
    """Raise what one run of `tokens` a step may by luck measure as too small: over eight seeds of
    128 tokens, a loss by 4e-5 to 6e-4, and the experts' gradients by 0.008 or 0.15 to 0.22.

    A loss is the mean of its tokens' errors: BF16 / sqrt(tokens) if they are independent. With a
    learned router, a token near a tie goes to another expert in one precision: 1 / sqrt(tokens) of
    the gradients change, and their norm by half the square of that if it is at right angles.
    """
    share = tokens**-0.5
    least = dict.fromkeys(rounding, BF16 * share)
    if "routers" in rounding:
        of_norm = {"loss": BF16 * share, "gradient norm": share**2 / 2}
        least = dict.fromkeys(rounding, share) | of_norm
    return {name: max(distance, least[name]) for name, distance in rounding.items()}


def distances(ours: Run, other: Run) -> dict[str, float]:
    """Return relative distances: the largest over the steps for losses and gradient norms; for
    gradients, by group (the difference's norm over `other`'s) and in the worst row of M and b.

    Raises:
        ValueError: the runs have different steps or parameters.
    """
    if len(ours.steps) != len(other.steps):
        raise ValueError(f"{len(ours.steps)} steps, where {len(other.steps)} were expected")
    if names := ", ".join(sorted(ours.gradients.keys() ^ other.gradients.keys())):
        raise ValueError(f"gradients that only one of them has: {names}")
    result = {
        "loss": largest_difference([s.loss for s in ours.steps], [s.loss for s in other.steps]),
        "gradient norm": largest_difference(
            [s.grad_norm for s in ours.steps], [s.grad_norm for s in other.steps]
        ),
    }
    for group in GROUPS:
        members = [name for name in other.gradients if group_of(name) == group]
        if members:
            result |= _group_distances(group, ours.gradients, other.gradients, members)
    return result


def group_of(name: str) -> str:
    """Return the group of a parameter."""
    return next(group for group, part in GROUPS.items() if re.search(part, name))


def _group_distances(
    group: str, ours: Mapping[str, Any], other: Mapping[str, Any], names: list[str]
) -> dict[str, float]:
    """Rows of M and b are positions: a fault in one of a thousand tokens shows in one row only."""
    errors = [(ours[name].double() - other[name].double()).square() for name in names]
    total = sum(float(other[name].double().square().sum()) for name in names) or 1.0
    result = {group: (sum(float(error.sum()) for error in errors) / total) ** 0.5}
    if group in ("M", "b"):  # [matrices, T, T] and [matrices, T]
        rows = sum(error.sum((0, *range(2, error.dim()))) for error in errors)
        result[f"{group}, worst row"] = float(rows.max() * len(rows) / total) ** 0.5
    return result


def compare(notes: Notes, what: str, ours: Run, known: Reference | None) -> None:
    """Note how far the device's run lies from the CPU's, in units of the CPU's rounding."""
    if known is None:
        notes.not_run(f"{what}: its case left no reference")
        return
    try:
        apart = distances(ours, known.run)
    except ValueError as error:
        notes.failed(f"{what}: {error}")
        return
    notes.data.setdefault("distances", {})[what] = apart
    if not any(apart.values()):
        notes.passed(f"{what}: bitwise")
        return
    shares = {name: distance / known.rounding[name] for name, distance in apart.items()}
    bad = {name: share for name, share in shares.items() if not share <= ALLOWED}
    said = ", ".join(f"{name} {share:.1f}" for name, share in (bad or shares).items())
    text = f"{what}, in units of bf16's rounding: {said}; {ALLOWED} are allowed"
    notes.check(not bad, text)
