"""Time how long a command takes to do what it was started for, each in a new process.

`--help`, `--dry-run`: until it exits. `first step`: until the first training step of a small gMLP
is in metrics.jsonl. The best of the calls counts, and the peer is the allowed time: a ratio over 1
is within it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import Record, add_only, benchmark_parser, report

ROOT = Path(__file__).resolve().parents[1]
RUN = f"""
    --config {ROOT}/configs/cpu/gmlp.yaml --mock-data --tokenizer-type NullTokenizer
    --vocab-size 4095 --log-interval 1 --eval-iters 0 --train-iters 1 --no-resume
"""
CASES = {
    "--help": ("--help", 3.0),
    "--dry-run": (f"{RUN} --dry-run", 10.0),
    "first step": (RUN, 15.0),
}


def seconds(flags: str, *, threads: int) -> float:
    """Return the seconds that one call takes, up to the first logged step if it trains."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "pretrain_smlp.py"), *flags.split()]
        if "train-iters" in flags:
            command += ["--log-dir", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        metrics = Path(folder) / "metrics.jsonl"
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while process.poll() is None and not _has_a_line(metrics):
            time.sleep(0.01)
        taken = time.perf_counter() - start
        _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{said.decode()[-3000:]}")
    return taken


def _has_a_line(path: Path) -> bool:
    return path.exists() and b"\n" in path.read_bytes()


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=3, of="calls per case")
    add_only(parser, CASES)
    arguments = parser.parse_args()
    records = []
    for case in arguments.cases:
        flags, allowed = CASES[case]
        calls = [seconds(flags, threads=arguments.threads) for _ in range(arguments.repeats)]
        best = min(calls)
        name = f"{case}, {allowed:g} s allowed"
        records.append(
            Record(case=name, ours_ms=best * 1e3, peer_ms=allowed * 1e3, ratio=allowed / best)
        )
    report(records, arguments.json)


if __name__ == "__main__":
    main()
