"""`make first-gpu`: every case in a process of its own, and a report to read and to send.

    PYTHONPATH=tests:. python -m support.first_gpu [--device cpu] [--only A,B] [--output FOLDER]

A case that raises, crashes or hangs fails, and the others go on. Exit code: 1 where one failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from support.first_gpu.cases import CASES
from support.first_gpu.notes import Place
from support.first_gpu.report import Report
from support.first_gpu.running import import_once, run_case
from support.launches import REPOSITORY

OUTPUT = REPOSITORY / "runs" / "first-gpu"


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="first-gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", metavar="A,B", help="cases that hold A or B, and what they need")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="(default runs/first-gpu)")
    return parser.parse_args(argv)


def chosen(only: str | None) -> list[str]:
    """Names in their order, with the cases whose files they read."""
    parts = (only or "").split(",")
    names = {name for name in CASES if any(part in name for part in parts)}
    wanted: set[str] = {"environment"}
    while names:
        wanted |= names
        names = {need for name in names for need in CASES[name].needs} - wanted
    return [name for name in CASES if name in wanted]


def has_gpu() -> bool:
    """Asked in a process of its own: one that has looked at a GPU cannot be forked."""
    import subprocess

    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not has_gpu():
        print(
            "first-gpu: error: --device cuda: torch finds no CUDA device (see docs/gpus.md). "
            "--device cpu runs the cases with the CPU in its place.",
            file=sys.stderr,
        )
        return 2
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    place = Place(options.device, options.output.resolve())
    if place.on_cpu:
        import_once()
    report = Report(place)
    for name in chosen(options.only):
        report.add(run_case(CASES[name], place, report.results))
        report.write()
    print(report.markdown())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
