"""An estimate of a step on one H100, from counts: of configs/paper/regular, 8 x 1,024 tokens.

    python benchmarks/roofline.py measure benchmarks/results/roofline.json    (minutes, on a CPU)
    python benchmarks/roofline.py table benchmarks/results/roofline.json

`measure` trains each system in two small versions, of its own layers and T = 1,024, on the CPU
that stands in for a GPU (tests/support/cuda_stand_in.py), and counts a step's operators and bytes:

    one       1 sample,  2 experts, width 64
    other     2 samples, 4 experts, width 64

    operators = n + m experts           solved for n and m
    bytes     = a samples + p parameters    solved for a and p

An operator reads and writes numbers of tokens, in proportion to samples and width, or of
parameters. So the step at full size has n + m E operators, and 8 a (1,024 / 64) + p P bytes.
Balanced assignment is taken out, and put in as the KERNELS operators that its kernels are, each
over scores [N, E]. The gate is counted without its kernel.

    launches  operators x LAUNCH              the host, where nothing hides it
    memory    bytes / BANDWIDTH               as if no operator found anything in a cache
    compute   3 x forward FLOPs / PEAK        the needed ones, as accounting/costs.py counts them
    step      the larger of launches and memory + compute

No time in it was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "paper" / "regular"
SYSTEMS = {
    "transformer": 0,
    "gshard": 64,
    "switch": 32,
    "base": 32,
    "hash": 32,
    "gmlp": 0,
    "amlp": 0,
    "smlp_deterministic": 32,
    "smlp_partial": 32,
}
"""Experts of a layer."""
PEAK, BANDWIDTH = 989e12, 3.35e12  # of an H100 SXM: FLOP/s, dense, bf16; bytes/s
LAUNCH = 5e-6  # seconds
KERNELS = 27  # operators of a call of balanced assignment with kernels
SAMPLES, TOKENS, WIDTH, VOCABULARY = 8, 1024, 1024, 50304
SMALL_WIDTH, STEPS = 64, 4
RUN = f"""
    --mock-data --tokenizer-type NullTokenizer --num-workers 0 --no-resume --eval-iters 0
    --train-iters {STEPS} --log-interval 100 --lr-warmup-iters 0
"""


@dataclass(frozen=True)
class Count:
    """Of a step: of a small version, or of the full one."""

    samples: int
    experts: int
    parameters: int
    operators: float
    bytes: float
    assignments: int
    """Calls of balanced assignment, which are not among operators and bytes of a small version."""


@dataclass(frozen=True)
class Row:
    """Of the table, in milliseconds."""

    launches: float
    memory: float
    compute: float

    @property
    def step(self) -> float:
        return max(self.launches, self.memory + self.compute)

    @property
    def mfu(self) -> float:
        return self.compute / self.step


def full(
    one: Count, other: Count, *, samples: int, experts: int, parameters: int, scale: float
) -> Count:
    """Solve the two equations above, and put another size in.

    Args:
        scale: its width over that of the two.
    """
    apart = other.experts - one.experts
    each = (other.operators - one.operators) / apart if apart else 0.0
    operators = one.operators + each * (experts - one.experts)
    more = other.samples / one.samples
    of_parameters = (other.bytes - more * one.bytes) / (other.parameters - more * one.parameters)
    of_samples = (one.bytes - of_parameters * one.parameters) / one.samples
    scores = 4 * samples * TOKENS * experts
    return Count(
        samples=samples,
        experts=experts,
        parameters=parameters,
        operators=operators + KERNELS * one.assignments,
        bytes=scale * samples * of_samples
        + of_parameters * parameters
        + scores * KERNELS * one.assignments,
        assignments=one.assignments,
    )


def row(count: Count, *, flops: float) -> Row:
    """flops: forward and backward, of all samples."""
    return Row(
        launches=1e3 * LAUNCH * count.operators,
        memory=1e3 * count.bytes / BANDWIDTH,
        compute=1e3 * flops / PEAK,
    )


def changes(system: str, *, samples: int, experts: int, width: int) -> dict[str, Any]:
    """What a version of this width has in place of the file's; the rest follows from the width."""
    changed = {
        "micro_batch_size": samples,
        "global_batch_size": samples,
        "vocab_size": VOCABULARY * width // WIDTH,
        "make_vocab_size_divisible_by": 1,
        "hidden_size": width,
        "ffn_hidden_size": 4 * width,
    }
    if experts:
        wide = 2 * width if system == "gshard" else 4 * width
        changed |= {"num_experts": experts, "moe_ffn_hidden_size": wide}
    if system == "amlp":
        changed["tiny_attention_width"] = width // 16
    return changed


def expected(system: str, **size: int) -> dict[str, Any]:
    """What tools/estimate.py says; without a size of the file itself."""
    from megatron_smlp.accounting.estimate import estimate
    from megatron_smlp.flags.config_file import read_yaml

    values = read_yaml(CONFIGS / f"{system}.yaml")
    values = {name.replace("-", "_"): value for name, value in values.items()}
    return estimate(values | (changes(system, **size) if size else {}))


def command_line(system: str, **size: int) -> str:
    """Flags of pretrain_smlp.py for a small version."""
    changed = changes(system, **size)
    words = [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]
    if system == "hash":
        words.append("--no-hash-table")  # which counts the tokens of a dataset
    return f"--config {CONFIGS / system}.yaml {RUN} {' '.join(words)}"


def count_step(system: str, **size: int) -> Count:
    """Train four steps on the stand-in, and count one, without what assigns tokens."""
    import torch
    from support import device_budgets
    from support.cuda_stand_in import Tally, watch

    from megatron_smlp.routers import base

    calls: list[Tally] = []
    assign = base.priced_assignment

    def dealt(scores: Any) -> Any:
        """Any balanced assignment makes the same layer."""
        with watch() as tally:
            experts = torch.arange(len(scores), device=scores.device) % scores.shape[1]
            prices = torch.zeros(scores.shape[1], device=scores.device)
        calls.append(tally)
        return experts, prices

    base.priced_assignment = dealt
    try:
        step = device_budgets.measure(command_line(system, **size), model="")["step"]
    finally:
        base.priced_assignment = assign
    return Count(
        samples=size["samples"],
        experts=size["experts"],
        parameters=expected(system, **size)["total_parameters"],
        operators=step["operators"] - sum(sum(c.operators.values()) for c in calls) / STEPS,
        bytes=1e6 * step["megabytes"] - sum(call.bytes for call in calls) / STEPS,
        assignments=len(calls) // STEPS,
    )


def measure(systems: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each system, the counts of its small versions, and what its full size is known to have."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.cuda_stand_in import install

    install()
    for system in systems:
        experts = SYSTEMS[system]
        small = [
            count_step(
                system, samples=samples, experts=2 * samples if experts else 0, width=SMALL_WIDTH
            )
            for samples in (1, 2)
        ]
        known = expected(system)
        yield (
            system,
            {
                "small": [asdict(count) for count in small],
                "experts": experts,
                "parameters": known["total_parameters"],
                "flops": 3e12 * SAMPLES * known["forward_needed_tflops_per_1024_tokens"],
            },
        )


def row_of(found: dict[str, Any]) -> tuple[Count, Row]:
    """Of one system of what `measure` returns."""
    one, other = (Count(**values) for values in found["small"])
    count = full(
        one,
        other,
        samples=SAMPLES,
        experts=found["experts"],
        parameters=found["parameters"],
        scale=WIDTH / SMALL_WIDTH,
    )
    return count, row(count, flops=found["flops"])


def table(found: dict[str, Any]) -> str:
    """Markdown, one line a system."""
    lines = [
        "| system | operators | GB | TFLOP | launches | memory | compute | step | MFU |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for system, values in found.items():
        count, times = row_of(values)
        milliseconds = (times.launches, times.memory, times.compute, times.step)
        cells = [
            system,
            f"{count.operators:,.0f}",
            f"{count.bytes / 1e9:.0f}",
            f"{values['flops'] / 1e12:.1f}",
            *(f"{time:.0f}" for time in milliseconds),
            f"{times.mfu:.0%}".replace("%", " %"),
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
