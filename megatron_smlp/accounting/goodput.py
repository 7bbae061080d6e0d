"""`tools/goodput.py`: what share of its time a run gets on, and how often it should save.

    M = MTBF of one GPU / number of GPUs          mean time between failures of the run
    T(w) = M exp(R / M) (exp((w + C) / M) - 1)    expected time for w seconds of steps and one save
    goodput(w) = w / T(w)
    w* = sqrt(2 C M)                              the interval of Young (1974), first order

C is the time that a save holds the steps up, R the time from a failure to the next step. T is exact
for failures that come at random with a constant rate, in restarts and saves too (Daly, A higher
order estimate of the optimum checkpoint interval, 2006, section 2).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_smlp.command_line import Parser
from megatron_smlp.errors import UsageError
from megatron_smlp.metrics_records import FILE_NAME, read_records

GPUS = (8, 128, 1024)
GPU_HOURS = 50_677
"""Hours of one GPU to an unexpected interruption: 54 days of 16,384 GPUs had 419 (Llama 3,
arXiv 2407.21783, table 5)."""


def goodput(interval: float, *, save: float, restart: float, mtbf: float) -> float:
    """Return the share of time that goes into steps that are not lost; all times in seconds."""
    exponents = (restart / mtbf, (interval + save) / mtbf)
    if max(exponents) > 500:  # it never gets that far
        return 0.0
    return interval / (mtbf * math.exp(exponents[0]) * math.expm1(exponents[1]))


def best_interval(*, save: float, mtbf: float) -> float:
    """Young's, in seconds between two saves."""
    return math.sqrt(2 * save * mtbf)


def measured_restart(run: Path) -> float:
    """Return the median of the seconds that a run was down, according to its metrics.jsonl.

    Raises:
        UsageError: it cannot be read, or has no restarts.
    """
    records = read_records(run / FILE_NAME)
    down = [record["restart"]["seconds_down"] for record in records if "restart" in record]
    if not down:
        raise UsageError(f"--run {run}: metrics.jsonl has no restarts: give --restart-seconds.")
    return statistics.median(down)


def rows(
    gpus: Sequence[int], *, save: float, restart: float, gpu_hours: float
) -> list[dict[str, float]]:
    """Return, for each number of GPUs, the MTBF and the best interval in seconds, and the goodput
    at that interval, at a third of it and at three times it."""
    result = []
    for number in gpus:
        mtbf = gpu_hours * 3600 / number
        best = best_interval(save=save, mtbf=mtbf)
        shares = {
            name: goodput(factor * best, save=save, restart=restart, mtbf=mtbf)
            for name, factor in (("third", 1 / 3), ("best", 1.0), ("triple", 3.0))
        }
        result.append({"gpus": number, "mtbf": mtbf, "interval": best, **shares})
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table.

    Raises:
        UsageError: a number is not positive, or a run has no restarts.
    """
    args = _arguments(argv)
    restart = measured_restart(Path(args.run)) if args.run else args.restart_seconds
    if min(*args.gpus, args.save_seconds, restart, args.mtbf_hours) <= 0:
        flags = "--gpus, --save-seconds, --restart-seconds, --mtbf-hours"
        raise UsageError(f"{flags}: give numbers over 0.")
    table = rows(args.gpus, save=args.save_seconds, restart=restart, gpu_hours=args.mtbf_hours)
    if args.json:
        print(json.dumps(table))
        return
    print(f"a save holds up {args.save_seconds:g} s, a restart takes {restart:g} s")
    print("  GPUs   a failure in   save every   goodput   at a third   at triple the interval")
    for row in table:
        print(
            f"{row['gpus']:6.0f} {row['mtbf'] / 3600:12.1f} h {row['interval'] / 60:8.1f} min"
            f" {row['best']:9.2%} {row['third']:12.2%} {row['triple']:24.2%}"
        )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="numbers of GPUs")
    parser.add_argument("--mtbf-hours", type=float, default=GPU_HOURS, help="of one GPU")
    parser.add_argument(
        "--save-seconds", type=float, required=True, help="that a save holds the steps up"
    )
    time = parser.add_mutually_exclusive_group(required=True)
    time.add_argument("--restart-seconds", type=float, help="from a failure to the next step")
    time.add_argument("--run", help="--save folder of a run that has restarted: the median of its")
    parser.add_argument("--json", action="store_true", help="print one list")
    return parser.parse_args(argv)
