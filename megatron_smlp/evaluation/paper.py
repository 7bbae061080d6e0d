"""What the paper reports: accuracy in %, ReCoRD exact match. Never measured by this program.

Source: arXiv 2203.06850 and its public leaderboards. `SECONDARY` marks the figures that come from
secondary recollection; they are shown in brackets.
"""

from __future__ import annotations

METRICS = {
    "copa": "acc",
    "piqa": "acc",
    "storycloze": "acc",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
    "record": "em",
}
"""Which of the harness's metrics stands beside the paper's column."""

_ROWS: dict[str, tuple[float, ...]] = {
    "BASE 10B": (63.0, 63.8, 61.4, 51.0, 30.2, 60.7),
    "HASH 10B": (64.0, 63.8, 64.7, 51.7, 33.0, 67.2),
    "GShard 9B": (76.0, 68.1, 67.9, 51.1, 38.0, 72.4),
    "Switch 9B": (75.0, 73.0, 73.3, 53.4, 52.5, 79.9),
    "sMLP-deterministic 9.4B": (79.0, 73.0, 74.7, 54.3, 54.5, 73.4),
}
FIGURES: dict[str, dict[str, float]] = {
    model: dict(zip(METRICS, row, strict=True)) for model, row in _ROWS.items()
}

SECONDARY = {
    *((model, "storycloze") for model in FIGURES),
    ("BASE 10B", "hellaswag"),
    ("Switch 9B", "piqa"),
}


def cell(model: str, task: str) -> str:
    """`63.8`, or `(61.4)` where the figure is from secondary recollection."""
    text = f"{FIGURES[model][task]:.1f}"
    return f"({text})" if (model, task) in SECONDARY else text


def task_of(name: str) -> str | None:
    """The paper's task that a task of the harness is, by name; None: another one."""
    base = name.removesuffix("_paper")
    base = "storycloze" if base.startswith("storycloze") else base
    return base if base in METRICS else None
