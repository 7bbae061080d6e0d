"""Time steps of our real training loop, alternating with a peer."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from timing import Record, add_only, benchmark_parser, report

from megatron_smlp.training.events import Listener, Outcome

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3


class _TakingTurns(Listener):
    """A listener of the training loop that lets the peer run after each step."""

    def __init__(self, peer: Callable[[], object]) -> None:
        self.peer = peer
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.started = 0.0

    def stepped(self, outcome: Outcome) -> None:
        now = time.perf_counter()
        self.ours.append(now - self.started)
        self.peer()
        self.started = time.perf_counter()
        self.theirs.append(self.started - now)


def steps_in_turns(
    flags: str, make_peer: Callable[[argparse.Namespace], Callable[[], object]], *, repeats: int
) -> tuple[list[float], list[float]]:
    """Train as `pretrain_smlp.py FLAGS` does, in this process; only once per process.

    Our time includes everything that the loop does for a step.

    Returns:
        milliseconds of our steps and of the peer's calls, after a few uncounted ones.
    """
    from megatron_smlp.training.captured_output import CapturedOutput

    sys.path.insert(0, str(ROOT))  # pretrain_smlp.py is not part of the package
    with CapturedOutput():
        from pretrain_smlp import patched_arguments, train

        args = patched_arguments([*flags.split(), "--train-iters", str(WARM_UP + repeats)])
        turns = _TakingTurns(make_peer(args))
        train(args, listeners=[turns])
    ours, theirs = (
        [1e3 * seconds for seconds in times[WARM_UP:]] for times in (turns.ours, turns.theirs)
    )
    return ours, theirs


def run(
    description: str | None,
    cases: Sequence[str],
    measure: Callable[[str, int], Record],
    *,
    repeats: int = 6,
) -> None:
    """Run the command line of a benchmark, every case in a process of its own.

    A case that fails does not end the others; the benchmark then exits with its name.

    Args:
        measure: case, steps -> its record; called in that process.
        repeats: steps per case and side by default.
    """
    parser = benchmark_parser(description, repeats=repeats, of="steps per case and side")
    add_only(parser, cases)
    arguments = parser.parse_args()
    import_once()
    ended = {case: _in_a_process(case, measure, arguments) for case in arguments.cases}
    records = [record for record in ended.values() if not isinstance(record, int)]
    if records:
        report(records, arguments.json)
    failed = [f"{case} ({code})" for case, code in ended.items() if isinstance(code, int)]
    if failed:
        raise SystemExit(f"failed, with exit codes: {', '.join(failed)}")


def import_once() -> None:
    """Import Megatron before the cases' processes are forked: imports take longer than steps."""
    from megatron_smlp.library_logging import silence_libraries
    from megatron_smlp.megatron_patches.late_compile import late_compile

    silence_libraries()
    with late_compile():
        import megatron_smlp.flags.parse
        import megatron_smlp.model  # noqa: F401


def _in_a_process(
    case: str, measure: Callable[[str, int], Record], arguments: argparse.Namespace
) -> Record | int:
    """Measure a case in a new process: Megatron keeps state in modules, so it trains only once.

    Returns:
        the record, or the exit code of a process that failed.
    """
    import torch

    # A process that has queried CUDA devices cannot be forked into one that uses them.
    method = "spawn" if torch.cuda.is_available() else "fork"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        process = multiprocessing.get_context(method).Process(
            target=_measure_into, args=(path, measure, case, arguments)
        )
        process.start()
        process.join()
        if process.exitcode:
            print(f"{case}: ended with exit code {process.exitcode}", file=sys.stderr, flush=True)
            return process.exitcode
        record: Record = json.loads(path.read_text())
    print(f"{record['case']}: ratio {record['ratio']:.2f}", file=sys.stderr, flush=True)
    return record


def _measure_into(
    path: Path,
    measure: Callable[[str, int], Record],
    case: str,
    arguments: argparse.Namespace,
) -> None:
    import torch

    os.chdir(path.parent)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    torch.set_num_threads(arguments.threads)
    path.write_text(json.dumps(measure(case, arguments.repeats)))
