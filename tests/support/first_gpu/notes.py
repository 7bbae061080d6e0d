"""Results of a case, line by line, and the place where it ran."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from support.launches import Step

type Verdict = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Place:
    """The device of the cases, "cuda" or "cpu", and the folder that holds what they write."""

    device: str
    folder: Path
    num_gpus: int = 0
    sabotage: str | None = None
    """What is broken on the device's side (sabotage.py)."""
    can_fork: bool = True
    """Whether a process that has imported everything can be forked into one that uses the GPU."""
    patience: float = 1.0
    """Factor on the cases' time limits, on a GPU."""

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def size(self) -> str:
        """Return flags; on a GPU, sequences span several blocks of a triangular product."""
        return f"--seq-length {self.tokens // 4} --global-batch-size 4"

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return 4 * (32 if self.on_cpu else 1024)


@dataclass
class Notes:
    """Lines with verdicts; `data` is machine-readable."""

    lines: list[tuple[Verdict, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def passed(self, text: str) -> None:
        self.lines.append(("passed", text))

    def failed(self, text: str) -> None:
        self.lines.append(("failed", text))

    def not_run(self, text: str) -> None:
        """text: what was not run, a colon, and why."""
        self.lines.append(("not run", text))

    def check(self, is_good: bool, text: str) -> None:
        """Add one line with its verdict."""
        self.lines.append(("passed" if is_good else "failed", text))

    def same_steps(
        self, what: str, ours: Sequence[Step], expected: Sequence[Step], *, tolerance: float
    ) -> None:
        """Check losses within a relative tolerance, gradient norms within five times that."""
        if not ours or len(ours) != len(expected):
            self.failed(f"{what}: {len(ours)} steps, where {len(expected)} were expected")
            return
        loss = largest_difference([s.loss for s in ours], [s.loss for s in expected])
        norm = largest_difference([s.grad_norm for s in ours], [s.grad_norm for s in expected])
        words = f"{what}: losses differ by {loss:.1e}, gradient norms by {norm:.1e} (relative)"
        self.check(
            loss <= tolerance and norm <= 5 * tolerance,
            f"{what}: bitwise" if loss == norm == 0 else f"{words}, allowed {tolerance:g}",
        )

    @property
    def verdict(self) -> Verdict:
        """Return the worst verdict of the lines; "not run" if no line ran."""
        verdicts = [verdict for verdict, _ in self.lines]
        if "failed" in verdicts:
            return "failed"
        return "passed" if "passed" in verdicts else "not run"

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"lines": self.lines, "data": self.data}), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Notes:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls([(verdict, text) for verdict, text in values["lines"]], values["data"])


def largest_difference(ours: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference; infinity for NaN."""
    pairs = zip(ours, expected, strict=True)
    differences = [abs(one - other) / max(abs(other), 1e-30) for one, other in pairs]
    return max((d if d == d else float("inf") for d in differences), default=0.0)
