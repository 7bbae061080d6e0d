"""Show where the time of a training step goes, by kind of operation.

    python benchmarks/profile_step.py --only "gmlp bf16"       of bench_step.py and bench_systems.py

Operators' milliseconds are self times of torch's profiler, without what they call. `rest` is the
time between operators: Python, autograd, the data loader, and the profiler itself, which makes a
step a few percent longer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import bench_step
import bench_systems
from hosted import import_once, steps_in_turns
from timing import add_only

WARM_UP, STEPS = 4, 5
KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "addmm_", "baddbmm", "linear", "_grouped_mm"),
    "attention": ("_scaled_dot_product",),
    "GELU": ("gelu",),
    "LayerNorm": ("native_layer_norm",),
    "Adam": ("_fused_adam",),
    "exp, max, softmax": ("exp", "max", "_softmax", "_log_softmax"),
    "copies, casts": ("copy_", "cat", "fill_", "zero_"),
    "sums and products": ("mul", "add", "sub", "div", "sum", "linalg_vector_norm", "tril"),
}


FLAGS_OF = dict.fromkeys(bench_step.CASES, bench_step.flags) | dict.fromkeys(
    bench_systems.CASES, bench_systems.flags
)
"""The function that returns the flags of each case."""


def kind_of(operator: str) -> str | None:
    """Return the kind of an operator by its profiler name; None for ranges of Python code."""
    if not operator.startswith("aten::"):
        return None
    name = operator.removeprefix("aten::")
    for kind, names in KINDS.items():
        exact = name.rstrip("_") in {n.rstrip("_") for n in names}
        if exact or any(len(n) > 3 and name.startswith(n) for n in names):
            return kind
    return "other operators"


class _Profiling:
    """The peer of `steps_in_turns`: profiles our steps between its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.seconds = 0.0
        self.profile: Any = None

    def __call__(self) -> None:
        from torch.profiler import profile

        self.calls += 1
        if self.calls == WARM_UP:
            self.profile = profile()
            self.profile.__enter__()
            self.seconds = -time.perf_counter()
        elif self.calls == WARM_UP + STEPS:
            self.seconds += time.perf_counter()
            self.profile.__exit__(None, None, None)

    def table(self) -> dict[str, float]:
        """Return the milliseconds of a step by kind; they add up to the step."""
        by_kind: Counter[str] = Counter()
        for event in self.profile.key_averages():
            kind = kind_of(event.key)
            if kind:
                by_kind[kind] += event.self_cpu_time_total / 1e3 / STEPS
        whole = 1e3 * self.seconds / STEPS
        return {**dict(by_kind.most_common()), "rest": whole - by_kind.total(), "step": whole}


def measure(case: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    profiling = _Profiling()

    def peer(_: argparse.Namespace) -> Callable[[], None]:
        return profiling

    steps_in_turns(FLAGS_OF[case](case), peer, repeats=WARM_UP + STEPS)
    table = profiling.table()
    print(f"{case}\n" + "\n".join(_lines(table)), file=sys.stderr, flush=True)


def _lines(table: dict[str, float]) -> list[str]:
    whole = table["step"]
    return [f"    {kind:20}{ms:9.1f} ms{100 * ms / whole:7.1f} %" for kind, ms in table.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    add_only(parser, FLAGS_OF)
    arguments = parser.parse_args()
    import_once()
    for case in arguments.cases:
        process = multiprocessing.get_context("fork").Process(
            target=measure, args=(case, arguments.threads)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
