"""The command line of tools/study.py: plan, run, status and report a study."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_smlp.command_line import Parser
from megatron_smlp.errors import UsageError, require_package
from megatron_smlp.study import leases, state
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.fairness import check_fair, flops_table
from megatron_smlp.study.plan import Calendar, PlannedRun, identity_of
from megatron_smlp.study.running import Worker
from megatron_smlp.study.state import State
from megatron_smlp.study.study_file import read_study
from megatron_smlp.study.systems import read_systems

if TYPE_CHECKING:
    from megatron_smlp.study.results import Results

RUNS = Path("runs/study")
DATA = Path("runs/study-data")
LEAST_EXPIRY = 10.0
"""Seconds: shared file systems show a sign of life late, and one of a busy machine is late."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="study.py", description="Compare systems: a study of studies/*.yaml.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {
        "plan": "check that the study is fair, and list its runs",
        "run": "work on it: start as many workers, on as many machines, as you like",
        "evaluate": "score final checkpoints: zero-shot tasks, and where in a text the loss lies",
        "status": "what is done, running, failed",
        "report": "write the tables, figures and verdicts, from the runs and the kept CSV files",
    }.items():
        command = commands.add_parser(name, help=text, description=f"{name}: {text}.")
        _add_arguments(command)
        if name == "run":
            command.add_argument(
                "--processes", type=_processes, default=1, metavar="N", help="of each run"
            )
            command.add_argument(
                "--retry", action="store_true", help="try the runs that failed once more"
            )
            command.add_argument(
                "--expiry", type=seconds, default=leases.EXPIRY, metavar="SECONDS",
                help="after which this worker counts as dead for others if it gives no sign",
            )  # fmt: skip
            command.add_argument(
                "--speed",
                action="store_true",
                help="only time the systems, in turns; nothing else should run on the machine",
            )
        if name == "report":
            command.add_argument(
                "--accept-other-sources", action="store_true",
                help="compare runs also where other sources made them that are not known to "
                "compute the same",
            )  # fmt: skip
        if name == "evaluate":
            command.add_argument(
                "--tasks", metavar="A,B",
                help="of lm-evaluation-harness, as copa,piqa,winogrande,hellaswag,record",
            )  # fmt: skip
            command.add_argument(
                "--data-dir", type=Path, metavar="DIR", help="local files of the tasks; no network"
            )
    return parser


def _processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of 1 or more")
    return int(text)


def seconds(text: str) -> float:
    """Return a time after which a worker may count as dead."""
    if not LEAST_EXPIRY <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give {LEAST_EXPIRY:g} seconds or more")
    return value


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("study", type=Path, metavar="STUDY", help="file of studies/")
    command.add_argument(
        "--runs", type=Path, default=RUNS, metavar="FOLDER", help=f"of all runs ({RUNS})"
    )
    command.add_argument(
        "--data", type=Path, default=DATA, metavar="FOLDER",
        help=f"what examples/study_data.sh made (default: {DATA})",
    )  # fmt: skip
    command.add_argument(
        "--results", type=Path, metavar="FOLDER",
        help="CSV files and report (default: studies/results/NAME/HARDWARE)",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code: 1 where runs failed.

    Raises:
        UsageError: the study or its data are missing, wrong or not fair.
    """
    for package in ("pandas", "scipy", "matplotlib"):
        require_package(package, purpose="a study", extra="'.[study]'")
    args = build_parser().parse_args(argv)
    # Leases are given back at the end, for the next one to have them at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    work = {
        "plan": _plan, "run": _run, "evaluate": _evaluate, "status": _status, "report": _report,
    }  # fmt: skip
    return work[args.command](args)


def read_state(args: argparse.Namespace) -> tuple[State, Results]:
    """Read the study, what was kept of it, and with which data its runs were begun.

    Raises:
        UsageError: see `read_study`, `read_systems` and `check_fair`; or the study changed.
    """
    from megatron_smlp.study.results import Results, default_folder, left_out

    study = read_study(args.study)
    systems = read_systems(study, folder=args.study.parent)
    check_fair(study, systems)
    folder = args.runs / study.name
    results = Results(args.results or default_folder(study.name))
    if args.results is None:
        for line in left_out(results.folder):
            print(f"note: {line}", file=sys.stderr)
    begun = {
        place: found
        for place in (folder, results.folder)
        if (found := state.read_json(place / state.BEGUN))
    }
    if args.command == "run" or not begun:
        is_needed = args.command == "run"
        contents = StudyData(args.data).contents() if is_needed or args.data.exists() else {}
        identity = identity_of(contents)
    else:
        identity = json.dumps(next(iter(begun.values()))["identity"], sort_keys=True)
    now = state.description(study, systems, identity)
    for place, before in begun.items():
        state.check_unchanged(before, now, where=place)
    known = State(
        study=study, file=args.study, systems=systems, identity=identity, folder=folder,
        kept=results.endings(), expiry=getattr(args, "expiry", leases.EXPIRY),
    )  # fmt: skip
    return known, results


@contextlib.contextmanager
def _alone(known: State, what: str) -> Iterator[None]:
    """Be the only process that does this for a study.

    Raises:
        UsageError: another one is at it.
    """
    folder = known.folder / what
    lease = leases.take(folder, expiry=known.expiry)
    if lease is None:
        raise UsageError(
            f"{folder}: another process is doing this. Wait until it ends; if it was killed, until "
            f"its --expiry has passed ({leases.EXPIRY:g} s by default)."
        )
    with lease:
        yield


def _plan(args: argparse.Namespace) -> int:
    from megatron_smlp.study.fingerprints import lines_on_sources
    from megatron_smlp.study.prices import evaluation_cost, price_lines, warm_up_lines
    from megatron_smlp.study.tables import Tables

    known, results = read_state(args)
    plan = known.plan()
    first = next(iter(known.systems.values()))
    calendar = Calendar.of(known.study, first)
    print(flops_table(known.study, known.systems))
    print(f"\n{'runs of a system':32}{'runs':>8}{'iterations':>12}{'tokens':>18}{'to do':>8}")
    to_do = {run.key for run in known.to_do(plan)}
    runs = (*plan.runs, *plan.pending)
    for name in known.systems:
        own = [run for run in runs if run.system == name]
        left = [run for run in own if run.key in to_do or run in plan.pending]
        print(_counts(name, own, left, calendar))
    left = [run for run in runs if run.key in to_do or run in plan.pending]
    print(_counts("all", runs, left, calendar))
    print()
    for line in price_lines(known.study, known.systems, left, Tables.of(results)):
        print(line)
    for line in warm_up_lines(plan):
        print(line)
    for line in lines_on_sources(known, results):
        print(f"  {line}")
    for name in plan.at_edge:
        print(f"  WARNING: the best rate of {name} is at the edge of the trials")
    print(f"\nevaluation: {evaluation_cost(first, calendar)}")
    for name, system in known.systems.items():
        print(f"  {name:30}{system.evaluation}")
    return 0


def _counts(
    name: str, runs: Sequence[PlannedRun], left: Sequence[PlannedRun], calendar: Calendar
) -> str:
    iterations = sum(run.end - run.start for run in runs)
    total = iterations * calendar.batch
    return f"  {name:30}{len(runs):>8}{iterations:>12,}{total:>18,}{len(left):>8}"


def _run(args: argparse.Namespace) -> int:
    from megatron_smlp.study.fingerprints import lines_on_sources, make_fingerprints

    known, results = read_state(args)
    StudyData(args.data).check_vocabulary(known.study.vocab_size)
    if args.speed:
        return _time(args, known, results)
    state.begin(known.folder, state.description(known.study, known.systems, known.identity))
    again = known.failures(known.plan()) if args.retry else {}
    data = StudyData(args.data)
    make_fingerprints(known, data, results, processes=args.processes)
    for line in lines_on_sources(known, results, processes=args.processes):
        print(f"note: {line}", file=sys.stderr)
    Worker(state=known, data=data, processes=args.processes, again=again).work()
    if failure := known.failure(known.plan()):
        print(f"{failure}. See tools/study.py status {args.study}", file=sys.stderr)
    return 1 if failure else 0


def _time(args: argparse.Namespace, known: State, results: Results) -> int:
    from megatron_smlp.study.speed import time_systems

    with _alone(known, "speed"):
        # Round by round, as one of many systems takes minutes: what is stopped has those before it.
        for lines in time_systems(known, StudyData(args.data), processes=args.processes):
            results.add_speed(lines)
    print(results.folder / "speed.csv")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from megatron_smlp.study.final import evaluate_finals

    known, results = read_state(args)
    with _alone(known, "evaluation"):
        results.collect(known)
        done = evaluate_finals(
            known, StudyData(args.data), results,
            tasks=args.tasks.split(",") if args.tasks else (),
            data_dir=args.data_dir,
        )  # fmt: skip
    print(f"{len(done)} checkpoints: {results.folder / 'evaluations.csv'}")
    return 0


def _status(args: argparse.Namespace) -> int:
    known, _ = read_state(args)
    plan = known.plan()
    for run in plan.runs:
        status = known.status(run)
        print(f"{status:9} {run.title:60} {known.folder_of(run)}")
        if status == state.FAILED:
            ending = known.ending(run) or {}
            print("\n".join(f"          {line}" for line in ending.get("last_lines", [])[-3:]))
            print(f"          tools/study.py run {args.study} --retry tries it again")
    if plan.pending:
        print(f"{len(plan.pending)} more runs are known when the learning rates are chosen")
    if failure := known.failure(plan):
        print(failure)
    return 0


def _report(args: argparse.Namespace) -> int:
    from megatron_smlp.study.report import write_report

    known, results = read_state(args)
    results.collect(known)
    if not len(results.runs):
        raise UsageError(
            f"{results.folder}: no run of study {known.study.name!r} is over: start "
            f"`tools/study.py run {args.study}` first."
        )
    for path in write_report(known, results, accept_other_sources=args.accept_other_sources):
        print(path)
    return 0
