"""`make first-gpu`: run every case in its own process, and write a report to read and to send.

    PYTHONPATH=tests:. python -m support.first_gpu [--device cpu] [--only A,B] [--output FOLDER]

A case that raises, crashes or hangs fails, and the others go on. The exit code is 1 if a case
failed; with --sabotage, if a case that should have failed did not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from support.first_gpu.cases import CASES
from support.first_gpu.notes import Place
from support.first_gpu.report import Report
from support.first_gpu.running import MOST_THREADS, forks_use_gpu, import_once, run_case
from support.first_gpu.sabotage import SABOTAGES
from support.launches import REPOSITORY

OUTPUT = REPOSITORY / "runs" / "first-gpu"


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="first-gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", metavar="A,B", help="cases that hold A or B, and what they need")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="(default runs/first-gpu)")
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="X", help="times the cases' limits, on a GPU"
    )
    parser.add_argument(
        "--sabotage",
        choices=SABOTAGES,
        metavar="NAME",
        help="break the device's side, which its cases have to see: " + ", ".join(SABOTAGES),
    )
    options = parser.parse_args(argv)
    if unknown := [part for part in (options.only or "").split(",") if not _named(part)]:
        parser.error(f"--only {unknown[0]}: no case has that in its name: {', '.join(CASES)}")
    before: Path = options.output
    if before.exists() and not (before / "report.md").exists() and any(before.iterdir()):
        parser.error(f"--output {before} has other files, and would be emptied: name a new folder")
    return options


def _named(part: str) -> list[str]:
    return [name for name in CASES if part in name]


def chosen(only: str | None) -> list[str]:
    """Return the chosen names in order, with the cases whose files they read."""
    names = {name for part in (only or "").split(",") for name in _named(part)}
    wanted: set[str] = {"environment"}
    while names:
        wanted |= names
        names = {need for name in names for need in CASES[name].needs} - wanted
    return [name for name in CASES if name in wanted]


def count_gpus() -> int:
    """Count in a separate process: one that has looked at a GPU cannot be forked."""
    import subprocess

    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout or 0)


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(argv)
    threads = min(int(os.environ.get("OMP_NUM_THREADS", MOST_THREADS)), MOST_THREADS)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not (gpus := count_gpus()):
        print(
            "first-gpu: error: --device cuda: torch finds no CUDA device (see docs/gpus.md). "
            "--device cpu runs the cases with the CPU in its place.",
            file=sys.stderr,
        )
        return 2
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    import_once()
    place = Place(options.device, options.output.resolve(), sabotage=options.sabotage)
    if not place.on_cpu:
        can_fork = forks_use_gpu()
        place = replace(place, num_gpus=gpus, can_fork=can_fork, patience=options.patience)
    broken = SABOTAGES[options.sabotage].cases if options.sabotage else ()
    report = Report(place)
    report.write()
    for name in chosen(options.only or ",".join(broken)):
        report.add(run_case(CASES[name], place, report.results))
        report.write()
    print(report.markdown())
    if not broken:
        return 1 if report.failed else 0
    unseen = [name for name in broken if name in report.results and name not in report.failed]
    seen = ", ".join(name for name in broken if name in report.failed)
    print(f"{options.sabotage} was seen by: {seen or 'no case'}")
    if unseen:
        print(f"{options.sabotage} was not seen by: {', '.join(unseen)}")
    return 1 if unseen else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nfirst-gpu: interrupted; report.md has the cases before", file=sys.stderr)
        sys.exit(130)
