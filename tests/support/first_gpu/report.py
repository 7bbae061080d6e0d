"""The report of the cases, as Markdown for a person and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from support.first_gpu.notes import Place
from support.first_gpu.running import Result, log_of

MARKS = {"passed": "", "failed": "**failed:** ", "not run": "not run: "}
LAST_LINES = 60
"""Lines to show of the log of a case that failed."""
SEND = """\
## What to send to the maintainers

This file: it is all in one. It holds versions, names of devices and paths of this machine, and
nothing of your data."""


class Report:
    """Results by name, in order; written after each, so that an aborted run leaves one too."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.results: dict[str, Result] = {}

    def add(self, result: Result) -> None:
        self.results[result.name] = result

    @property
    def failed(self) -> list[str]:
        return [name for name, result in self.results.items() if result.verdict == "failed"]

    def write(self) -> None:
        """Write report.md and report.json."""
        (self.place.folder / "report.md").write_text(self.markdown() + "\n", encoding="utf-8")
        values = {
            "device": self.place.device,
            "cases": {
                name: {"verdict": result.verdict, "seconds": result.seconds} | asdict(result.notes)
                for name, result in self.results.items()
            },
        }
        (self.place.folder / "report.json").write_text(json.dumps(values, indent=1) + "\n")

    def markdown(self) -> str:
        counts = Counter(result.verdict for result in self.results.values())
        seconds = sum(result.seconds for result in self.results.values())
        summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in MARKS)
        parts = [
            f"# First run on {self._machine()}",
            f"{summary}, in {seconds:.0f} seconds.",
        ]
        parts += [SEND, self._environment(), self._table()]
        parts += [*map(_details, self.results.values()), *map(self._log, self.failed)]
        return "\n\n".join([*parts, self._data()])

    def _machine(self) -> str:
        machine = "the CPU in place of a GPU" if self.place.on_cpu else "a GPU"
        broken = self.place.sabotage
        return f"{machine}, sabotaged by {broken}" if broken else machine

    def _environment(self) -> str:
        environment = self.results.get("environment")
        data = environment.notes.data if environment else {}
        texts = {name: str(value) for name, value in data.items()}
        return "\n".join(
            f"* {name}:\n\n{_indented(text)}\n" if "\n" in text else f"* {name}: {text}"
            for name, text in texts.items()
        )

    def _table(self) -> str:
        rows = [f"| {r.name} | {r.verdict} | {r.seconds:.0f} |" for r in self.results.values()]
        return "\n".join(["| case | | seconds |", "|---|---|---:|", *rows])

    def _log(self, name: str) -> str:
        """Return the end of a failed case's output."""
        path = log_of(name, self.place)
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return f"## The end of {path.name}\n\n" + _indented(
            "\n".join(text.splitlines()[-LAST_LINES:])
        )

    def _data(self) -> str:
        """Return what the cases measured as JSON, one line per case."""
        measured = {name: result.notes.data for name, result in self.results.items()}
        lines = [json.dumps({name: data}) for name, data in measured.items() if data]
        return "## Data\n\n" + _indented("\n".join(lines))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _details(result: Result) -> str:
    lines = [f"* {MARKS[verdict]}{text}" for verdict, text in result.notes.lines]
    return "\n".join([f"## {result.name}", "", *lines])
