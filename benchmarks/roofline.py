"""Estimate a step of configs/paper/regular on one of eight H100s, from counts.

    python benchmarks/roofline.py measure benchmarks/results/roofline.json    (minutes, on a CPU)
    python benchmarks/roofline.py table benchmarks/results/roofline.json

Each GPU has SAMPLES x 1,024 tokens in each of the MICRO_BATCHES micro-batches of a step, and an
eighth of the experts; the optimizer's state is sharded over all.

`measure` trains small versions of each system, with its own layers and T = 1,024, on a CPU that
stands in for a GPU (tests/support/cuda_stand_in.py), and counts a step's operators and bytes:

    one       1 sample,  2 experts, width 64        each with one micro-batch, and with two
    other     2 samples, 4 experts, width 64

What the second micro-batch adds is one micro-batch; the rest of a step is the update. For each

    operators = n + m experts                       solved for n and m
    bytes     = a samples + p parameters            solved for a and p; an update has no a

An operator reads and writes elements of tokens, in proportion to samples and width, or of
parameters. So at full size, with e experts and P parameters on a GPU, P' of them in its optimizer:

    micro-batch    n + m e operators, and 8 a (1,024 / 64) + p P bytes
    update         n' + m' e operators, and p' P' bytes

Balanced assignment is subtracted and replaced by the KERNELS operators of its kernels, each over
scores [N, E]. So is each gate, counted alone, forward and backward: its kernels are GATE_OPERATORS
and move GATE_UNITS of one gate-wide tensor (counted by tests/cuda_without_a_gpu/kernel_counts.py),
and one head's dM exists in parts: 31 MB, 0.9 of a unit at these sizes, and one more operator. A
Megatron function that is compiled on a GPU (roofline_counts.COMPILED) is one operator, which reads
its inputs and writes its outputs.

    launches  operators x LAUNCH              the host, where nothing hides it
    memory    bytes / BANDWIDTH               as if every operator missed every cache
    compute   3 x forward FLOPs / PEAK        the needed ones, as accounting/costs.py counts them
    dispatch  tokens to experts, back, and their gradients / LINK, where experts are spread
    time      the larger of launches and the sum of the others, for MICRO_BATCHES and an update

PEAK (by kind of product), BANDWIDTH and LINK are each multiplied by an efficiency from
results/efficiencies.json, which has a low, a likely and a high one, each with its source. MFU is
relative to PEAK, as in metrics.jsonl. Other messages between GPUs are left out, and no time here
was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roofline_counts import (
    GPUS,
    MICRO_BATCHES,
    SAMPLES,
    SMALL_WIDTH,
    SYSTEMS,
    TOKENS,
    WIDTH,
    Count,
    measure,
)

PEAK, BANDWIDTH, LINK = 989e12, 3.35e12, 450e9  # of an H100 SXM: bf16 FLOP/s; bytes/s
EFFICIENCIES = Path(__file__).with_name("results") / "efficiencies.json"
COLUMNS = (
    *("system", "operators", "GB", "TFLOP"),
    *("launches", "memory", "compute", "dispatch", "update", "MFU"),
)
RANGE = ("low", "likely", "high")
LAUNCH = 5e-6  # seconds
KERNELS = 27  # operators of a call of balanced assignment with kernels
GATE_UNITS = {"one head": 20.3, "heads": 21.3, "partial prediction": 24.0}
GATE_OPERATORS = {"one head": 11, "heads": 10, "partial prediction": 70}


@dataclass(frozen=True)
class Part:
    """A micro-batch, or an update: operators = n + m experts, bytes = a samples + p parameters."""

    n: float
    m: float
    a: float
    p: float

    @classmethod
    def through(cls, one: Count, other: Count) -> Part:
        """Solve the equations; `one` and `other` are counts of this part alone."""
        apart = other.experts - one.experts
        m = (other.operators - one.operators) / apart if apart else 0.0
        more = other.samples / one.samples
        p = (other.bytes - more * one.bytes) / (other.parameters - more * one.parameters)
        a = (one.bytes - p * one.parameters) / one.samples
        return cls(n=one.operators - m * one.experts, m=m, a=a, p=p)


@dataclass(frozen=True)
class Row:
    """A row of the table, for one GPU."""

    operators: float
    gigabytes: float
    """Per micro-batch, as are the operators."""
    teraflops: float
    launches: float  # milliseconds, as is all that follows
    memory: float
    compute: float
    dispatch: float
    update: float

    @property
    def micro_batch(self) -> float:
        return max(self.launches, self.memory + self.compute + self.dispatch)

    @property
    def mfu(self) -> float:
        time = self.micro_batch + self.update / MICRO_BATCHES
        return 1e15 * self.teraflops / PEAK / time


def parts(counts: Sequence[Count]) -> tuple[Part, Part]:
    """Return a micro-batch and an update, from one, other, and both with two micro-batches."""
    one, other, one_twice, other_twice = counts
    micro_batches, updates = [], []
    for once, twice in ((one, one_twice), (other, other_twice)):
        operators, size = twice.operators - once.operators, twice.bytes - once.bytes
        micro_batches.append(replace(once, operators=operators, bytes=size))
        rest = replace(once, operators=once.operators - operators, bytes=once.bytes - size)
        updates.append(rest)
    update = Part.through(*updates)
    first = updates[0]
    return Part.through(*micro_batches), replace(update, a=0.0, p=first.bytes / first.parameters)


def efficiencies(which: str) -> dict[str, float]:
    """Return the efficiencies of PEAK, BANDWIDTH and LINK, by kind; which: one of RANGE."""
    kinds = json.loads(EFFICIENCIES.read_text(encoding="utf-8"))
    return {kind: entry[which] for kind, entry in kinds.items()}


def row_of(found: dict[str, Any], share: Mapping[str, float]) -> Row:
    """Return the row of one system, as `measure` found it; share: efficiencies."""
    counts = [Count(**values) for values in found["small"]]
    one, experts = counts[0], found["experts"]
    micro_batch, update = parts(counts)
    here = experts / GPUS
    scores = 4 * SAMPLES * TOKENS * experts
    gate = 2 * SAMPLES * TOKENS * 2 * WIDTH  # bytes of F = 2 D numbers a token
    operators = (
        micro_batch.n + micro_batch.m * here + KERNELS * one.assignments
        + sum(GATE_OPERATORS[kind] * number for kind, number in one.gates.items())
    )  # fmt: skip
    size = (
        WIDTH / SMALL_WIDTH * SAMPLES * micro_batch.a + micro_batch.p * found["parameters_of_gpu"]
        + scores * KERNELS * one.assignments
        + sum(GATE_UNITS[kind] * gate * number for kind, number in one.gates.items())
    )  # fmt: skip
    of_update = max(
        LAUNCH * (update.n + update.m * here),
        update.p * found["parameters"] / GPUS / (BANDWIDTH * share["memory"]),
    )
    products = sum(flops / share[kind] for kind, flops in found["flops_by_kind"].items())
    sent = 4 * found["choices"] * 2 * SAMPLES * TOKENS * WIDTH * (GPUS - 1) / GPUS
    return Row(
        operators=operators,
        gigabytes=size / 1e9,
        teraflops=found["flops"] / 1e12,
        launches=1e3 * LAUNCH * operators,
        memory=1e3 * size / (BANDWIDTH * share["memory"]),
        compute=1e3 * products / PEAK,
        dispatch=1e3 * sent / (LINK * share["dispatch"]),
        update=1e3 * of_update,
    )


def table(found: dict[str, Any]) -> str:
    """Return a Markdown table, one line per system: likely times, and MFU with its range."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
    ]
    for system, values in found.items():
        low, row, high = (row_of(values, efficiencies(which)) for which in RANGE)
        times = (row.launches, row.memory, row.compute, row.dispatch)
        cells = [
            system,
            f"{row.operators:,.0f}",
            f"{row.gigabytes:.0f}",
            f"{row.teraflops:.1f}",
            *(f"{time:.0f}" for time in times),
            f"{row.update:.1f}",
            f"{100 * row.mfu:.0f} % ({100 * low.mfu:.0f}-{100 * high.mfu:.0f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["measure", "table"])
    parser.add_argument("path", type=Path, help="counts, JSON: written, or read")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    arguments = parser.parse_args()
    if arguments.what == "measure":
        found = json.loads(arguments.path.read_text()) if arguments.path.is_file() else {}
        for system, values in measure(arguments.only):
            found[system] = values
            in_order = {name: found[name] for name in SYSTEMS if name in found}
            arguments.path.write_text(json.dumps(in_order, indent=1) + "\n", encoding="utf-8")
    else:
        print(table(json.loads(arguments.path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
