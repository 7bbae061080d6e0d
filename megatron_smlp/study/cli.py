"""The command line of tools/study.py: plan, run, status and report a study."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_smlp.command_line import Parser
from megatron_smlp.errors import UsageError, require_package
from megatron_smlp.study import state
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.fairness import check_fair, flops_table
from megatron_smlp.study.plan import Calendar, identity_of
from megatron_smlp.study.state import State
from megatron_smlp.study.study_file import Study, read_studies
from megatron_smlp.study.systems import read_systems
from megatron_smlp.study.worker import Worker

if TYPE_CHECKING:
    from megatron_smlp.study.results import Results

HELP = {
    "plan": "check that the study is fair, and list its runs",
    "run": "train its runs; start any number of workers, on any machines",
    "reuse": "take over the runs of other studies' results that this one shares",
    "evaluate": "score final checkpoints: zero-shot tasks, and where in a text the loss lies",
    "export": "write the best run of each system for transformers, with a model card",
    "status": "what is done, running, failed",
    "report": "write the tables, figures and verdicts, from the runs and the kept CSV files",
}
RUNS = Path("runs/study")
DATA = Path("runs/study-data")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="study.py", description="Compare systems: a study of studies/*.yaml.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, text in HELP.items():
        parsers[name] = command = commands.add_parser(
            name, help=text, description=f"{name}: {text}."
        )
        command.add_argument("study", type=Path, metavar="STUDY", help="file of studies/")
        for flag, default, help_text in (
            ("--runs", RUNS, f"of all runs (default: {RUNS})"),
            ("--data", DATA, f"made by examples/study_data.sh (default: {DATA})"),
            ("--results", None, "CSV files and report (default: studies/results/NAME/HARDWARE)"),
        ):
            command.add_argument(flag, type=Path, default=default, metavar="FOLDER", help=help_text)
    run, evaluate = parsers["run"], parsers["evaluate"]
    run.add_argument("--processes", type=int, default=1, metavar="N", help="of each run")
    run.add_argument("--retry", action="store_true", help="retry the failed runs")
    run.add_argument(
        "--expiry", type=float, default=state.EXPIRY, metavar="SECONDS",
        help="of silence after which other workers consider this one dead",
    )  # fmt: skip
    run.add_argument(
        "--speed", action="store_true",
        help="only time the systems, in turns; nothing else should run on the machine",
    )  # fmt: skip
    parsers["reuse"].add_argument(
        "--of", type=Path, nargs="+", required=True, metavar="FOLDER",
        help="--results of a study, as studies/results/NAME/HARDWARE",
    )  # fmt: skip
    parsers["report"].add_argument(
        "--accept-other-sources", action="store_true",
        help="also compare runs made by other sources that are not known to compute the same",
    )  # fmt: skip
    evaluate.add_argument(
        "--tasks", metavar="A,B",
        help="of lm-evaluation-harness, as copa,piqa,winogrande,hellaswag,record",
    )  # fmt: skip
    evaluate.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="local files of the tasks; no network"
    )
    export = parsers["export"]
    export.add_argument(
        "--systems", required=True, metavar="A,B", help="of the study, in each size that has them"
    )
    export.add_argument(
        "--save", type=Path, required=True, metavar="FOLDER", help="for a folder STUDY-SYSTEM each"
    )
    export.add_argument("--overwrite", action="store_true", help="replace existing folders")
    export.add_argument("--license", metavar="NAME", help="in the model cards, as the Hub names it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code, 1 if runs failed.

    Raises:
        UsageError: the study or its data are missing or invalid, or the comparison is not fair.
    """
    args = build_parser().parse_args(argv)
    for package in ("pandas", "scipy", "matplotlib"):
        require_package(package, purpose="a study", extra="'megatron-smlp[study]'")
    # Exit normally on SIGTERM, which releases leases, so that the next worker gets them at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    states = read_states(args)
    if args.command == "report":
        return _report(args, states)
    if args.command == "export":
        return _export(args, states)
    if args.command == "run" and args.retry:
        for known, _ in states:
            known.retry_failures()
    work = COMMANDS[args.command]
    if len(states) == 1:
        return work(args, *states[0])
    if args.command == "run" and not args.speed:
        for known, results in states:  # wait for other workers only once no size has a free run
            print(f"== {known.study.name}", flush=True)
            _run(args, known, results, waits=False)
    codes = []
    for known, results in states:
        print(f"== {known.study.name}", flush=True)
        codes.append(work(args, known, results))
    return max(codes)


def read_states(args: argparse.Namespace) -> list[tuple[State, Results]]:
    """Read the study, or each of its sizes, with its kept results and the data its runs began with.

    Raises:
        UsageError: see `read_studies`, `read_systems` and `check_fair`; or the study has changed.
    """
    from megatron_smlp.study.results import default_folder

    name, studies = read_studies(args.study)
    if args.results is None and not (here := default_folder(name)).exists():
        for other in sorted(here.parent.glob("*")):
            text = f"{here} does not exist; --results {other} extends another machine's"
            print(f"note: {text}", file=sys.stderr)
    return [_read_state(args, name, study) for study in studies]


def _read_state(args: argparse.Namespace, name: str, study: Study) -> tuple[State, Results]:
    """Read a study, or one size of study `name`, with a subfolder in that study's results."""
    from megatron_smlp.study.results import Results, default_folder

    systems = read_systems(study, folder=args.study.parent)
    check_fair(study, systems)
    folder = args.runs / study.name
    whole, own = args.results or default_folder(name), study.name if study.name != name else ""
    results = Results(whole / own)
    records = {place: state.read_json(place / state.BEGUN) for place in (folder, results.folder)}
    begun = {place: before for place, before in records.items() if before}
    if begun and args.command != "run":
        identity = json.dumps(next(iter(begun.values()))["identity"], sort_keys=True)
    else:
        is_needed = args.command in ("run", "reuse") or args.data.exists()
        identity = identity_of(StudyData(args.data).contents() if is_needed else {})
    known = State(
        study=study, file=args.study, systems=systems, identity=identity, folder=folder,
        kept=results.endings(), expiry=getattr(args, "expiry", state.EXPIRY),
    )  # fmt: skip
    for place, before in begun.items():
        state.check_unchanged(before, known.description(), where=place)
    return known, results


def _plan(args: argparse.Namespace, known: State, results: Results) -> int:
    from megatron_smlp.study.fingerprints import lines_on_sources
    from megatron_smlp.study.prices import price_lines
    from megatron_smlp.study.tables import Tables

    plan = known.plan()
    calendar = Calendar.of(known.study, next(iter(known.systems.values())))
    print(flops_table(known.study, known.systems))
    print(f"\n{'runs of a system':32}{'runs':>8}{'iterations':>12}{'tokens':>18}{'to do':>8}")
    to_do = {run.key for run in (*known.to_do(plan), *plan.pending)}
    runs = (*plan.runs, *plan.pending)
    left = [run for run in runs if run.key in to_do]
    for name in (*known.systems, "all"):
        own, own_left = ([r for r in of if name in (r.system, "all")] for of in (runs, left))
        iterations = sum(run.end - run.start for run in own)
        tokens = iterations * calendar.batch
        print(f"  {name:30}{len(own):>8}{iterations:>12,}{tokens:>18,}{len(own_left):>8}")
    print()
    lines = price_lines(known.study, known.systems, left, Tables.of(results))
    print(*lines, *lines_on_sources(known, results), sep="\n")
    for name in plan.at_edge:
        print(f"  WARNING: the best rate of {name} is at the edge of the trials")
    return 0


def _run(args: argparse.Namespace, known: State, results: Results, *, waits: bool = True) -> int:
    from megatron_smlp.study.fingerprints import lines_on_sources, make_fingerprints

    StudyData(args.data).check_vocabulary(known.study.vocab_size)
    if args.speed:
        return _time(args, known, results)
    known.record(known.folder)
    data = StudyData(args.data)
    make_fingerprints(known, data, results, processes=args.processes)
    for line in lines_on_sources(known, results, processes=args.processes):
        print(line, file=sys.stderr)
    worker = Worker(state=known, data=data, processes=args.processes)
    worker.work(waits=waits)
    plan = known.plan()
    if failure := known.failure(plan):
        print(f"{failure}. See tools/study.py status {args.study}", file=sys.stderr)
    elif not known.to_do(plan):
        print(f"all {len(plan.runs)} runs are done; next: tools/study.py report {args.study}")
    return 1 if failure else 0


def _time(args: argparse.Namespace, known: State, results: Results) -> int:
    from megatron_smlp.study.speed import time_systems

    # Save after each round, which takes minutes with many systems: a stop keeps earlier ones.
    for lines in time_systems(known, StudyData(args.data), processes=args.processes):
        results.add_speed(lines)
    print(results.folder / "speed.csv")
    return 0


def _reuse(args: argparse.Namespace, known: State, results: Results) -> int:
    from megatron_smlp.study.results import Results

    others = []
    for folder in args.of:
        if not (files := sorted(folder.rglob("runs.csv"))):  # of a study with sizes: one in each
            raise UsageError(f"--of {folder} holds no runs.csv: `study.py report` writes it.")
        others += [Results(file.parent) for file in files]
    had = len(results.runs)
    # Repeat, since only the results of trials determine which runs follow them.
    while any(results.take_over(_with(known, results), other) for other in others):
        pass
    known = _with(known, results)
    left = len(known.to_do(plan := known.plan())) + len(plan.pending)
    taken = len(results.runs) - had
    print(f"{results.folder / 'runs.csv'}: {taken} runs taken over, {left} to do")
    return 0


def _with(known: State, results: Results) -> State:
    """Return `known` updated with the endings of all runs in the results."""
    return dataclasses.replace(known, kept=results.endings())


def _evaluate(args: argparse.Namespace, known: State, results: Results) -> int:
    from megatron_smlp.study.final import evaluate_finals

    results.collect(known)
    done = evaluate_finals(
        known, StudyData(args.data), results,
        tasks=args.tasks.split(",") if args.tasks else (),
        data_dir=args.data_dir,
    )  # fmt: skip
    print(f"{done} checkpoints: {results.folder / 'evaluations.csv'}")
    return 0


def _export(args: argparse.Namespace, states: Sequence[tuple[State, Results]]) -> int:
    from megatron_smlp.study.final import export_best

    more = ["--overwrite"] if args.overwrite else []
    more += ["--license", args.license] if args.license else []
    names = args.systems.split(",")
    known_names = dict.fromkeys(name for known, _ in states for name in known.systems)
    if unknown := [name for name in names if name not in known_names]:
        raise UsageError(f"--systems {unknown[0]}: {args.study} has {', '.join(known_names)}.")
    for known, _ in states:
        for system in filter(known.systems.__contains__, names):
            folder = args.save / f"{known.study.name}-{system}"
            export_best(known, system, folder, more)
            print(folder)
    return 0


def _status(args: argparse.Namespace, known: State, _: Results) -> int:
    plan = known.plan()
    for run in plan.runs:
        status = known.status(run)
        print(f"{status:9} {run.title:60} {known.folder_of(run)}")
        if status == state.FAILED:
            ending = known.ending(run) or {}
            print("\n".join(f"          {line}" for line in ending.get("last_lines", [])[-3:]))
            print(f"          tools/study.py run {args.study} --retry retries it")
    if plan.pending:
        print(f"{len(plan.pending)} more runs follow once the learning rates are chosen")
    if failure := known.failure(plan):
        print(failure)
    return 0


def _report(args: argparse.Namespace, states: Sequence[tuple[State, Results]]) -> int:
    from megatron_smlp.study.report import Page, write_report
    from megatron_smlp.study.sizes import write_sizes

    pages = []
    for known, results in states:
        results.collect(known)
        pages.append(Page(known, results, accept_other_sources=args.accept_other_sources))
        if len(results.runs):
            print(*write_report(pages[-1]), sep="\n")
    if not any(len(results.runs) for _, results in states):
        raise UsageError(
            f"{args.study}: no run has ended: run `tools/study.py run {args.study}` first."
        )
    if len(states) > 1:
        name, _ = read_studies(args.study)
        print(*write_sizes(name, pages, results.folder.parent), sep="\n")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace, State, Results], int]] = {
    "plan": _plan, "run": _run, "reuse": _reuse,
    "evaluate": _evaluate, "status": _status,
}  # fmt: skip
