"""An estimate of a step on one of eight H100s, from counts: configs/paper/regular.

    python benchmarks/roofline.py measure benchmarks/results/roofline.json    (minutes, on a CPU)
    python benchmarks/roofline.py table benchmarks/results/roofline.json

Each GPU has SAMPLES x 1,024 tokens in each of the MICRO_BATCHES micro-batches of a step, and an
eighth of the experts; the optimizer's state is spread over all.

`measure` trains each system in small versions, of its own layers and T = 1,024, on the CPU that
stands in for a GPU (tests/support/cuda_stand_in.py), and counts a step's operators and bytes:

    one       1 sample,  2 experts, width 64        each with one micro-batch, and with two
    other     2 samples, 4 experts, width 64

What the second micro-batch adds is a micro-batch; the rest of a step is the update. Of each

    operators = n + m experts                       solved for n and m
    bytes     = a samples + p parameters            solved for a and p; an update has no a

An operator reads and writes numbers of tokens, in proportion to samples and width, or of
parameters. So at full size, with e experts and P parameters on a GPU, P' of them of its optimizer:

    micro-batch    n + m e operators, and 8 a (1,024 / 64) + p P bytes
    update         n' + m' e operators, and p' P' bytes

Balanced assignment is taken out, and put in as the KERNELS operators that its kernels are, each
over scores [N, E]. Each gate, too, counted alone, forward and backward: its kernels are
GATE_OPERATORS and move GATE_UNITS of one gate-wide tensor (counted by
tests/cuda_without_a_gpu/kernel_counts.py). A function of Megatron's that is compiled on a GPU
(COMPILED) is one operator, which reads what goes in and writes what comes out.

    launches  operators x LAUNCH              the host, where nothing hides it
    memory    bytes / BANDWIDTH               as if no operator found anything in a cache
    compute   3 x forward FLOPs / PEAK        the needed ones, as accounting/costs.py counts them
    time      the larger of launches and memory + compute, of MICRO_BATCHES and an update

Messages between GPUs are not in it. No time in it was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

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
GPUS, MICRO_BATCHES = 8, 8  # --global-batch-size 512
GATE_UNITS = {"one head": 19.4, "heads": 21.3, "partial prediction": 24.0}
GATE_OPERATORS = {"one head": 10, "heads": 10, "partial prediction": 70}
COMPILED = {
    "megatron.core.fusions.fused_cross_entropy": (
        "calculate_logits_max",
        "calculate_predicted_logits",
        "calculate_cross_entropy_loss",
        "calculate_gradients",
    ),
    "megatron.core.fusions.fused_bias_dropout": ("bias_dropout_add_fused_train",),
}
"""By `jit_fuser`. Autograd runs the backward of the last one, which is left as it is."""
SMALL_WIDTH, STEPS = 64, 4
RUN = f"""
    --mock-data --tokenizer-type NullTokenizer --num-workers 0 --no-resume --eval-iters 0
    --train-iters {STEPS} --log-interval 100 --lr-warmup-iters 0
"""


@dataclass(frozen=True)
class Count:
    """Of a step of a small version: without balanced assignments and gates."""

    samples: int
    experts: int
    parameters: int
    micro_batches: int
    operators: float
    bytes: float
    assignments: int
    """Calls of balanced assignment in a micro-batch."""
    gates: Mapping[str, int]
    """Number of them, by kind."""


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
    """Of the table: of a GPU."""

    operators: float
    gigabytes: float
    """Of a micro-batch, as the operators."""
    teraflops: float
    launches: float  # milliseconds, as all that follows
    memory: float
    compute: float
    update: float

    @property
    def micro_batch(self) -> float:
        return max(self.launches, self.memory + self.compute)

    @property
    def mfu(self) -> float:
        return self.compute / (self.micro_batch + self.update / MICRO_BATCHES)


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


def row_of(found: dict[str, Any]) -> Row:
    """Of one system of what `measure` returns."""
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
        update.p * found["parameters"] / GPUS / BANDWIDTH,
    )
    return Row(
        operators=operators,
        gigabytes=size / 1e9,
        teraflops=found["flops"] / 1e12,
        launches=1e3 * LAUNCH * operators,
        memory=1e3 * size / BANDWIDTH,
        compute=1e3 * found["flops"] / PEAK,
        update=1e3 * of_update,
    )


def changes(
    system: str, *, samples: int, experts: int, width: int, micro_batches: int = 1
) -> dict[str, Any]:
    """What a version of this width has in place of the file's; the rest follows from the width."""
    changed = {
        "micro_batch_size": samples,
        "global_batch_size": samples * micro_batches,
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
    """What tools/estimate.py says; without a size of the file itself, on its GPUs."""
    from megatron_smlp.accounting.estimate import estimate
    from megatron_smlp.flags.yaml_file import read_yaml

    values = read_yaml(CONFIGS / f"{system}.yaml")
    values = {name.replace("-", "_"): value for name, value in values.items()}
    if size:
        return estimate(values | changes(system, **size))
    spread = GPUS if SYSTEMS[system] else 1
    layout = {"world_size": GPUS, "expert_model_parallel_size": spread}
    return estimate(values | layout | {"expert_tensor_parallel_size": 1})


def command_line(system: str, **size: int) -> str:
    """Flags of pretrain_smlp.py for a small version."""
    changed = changes(system, **size)
    words = [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]
    if system == "hash":
        words.append("--no-hash-table")  # which counts the tokens of a dataset
    return f"--config {CONFIGS / system}.yaml {RUN} {' '.join(words)}"


def count_step(system: str, **size: int) -> Count:
    """Train four steps on the stand-in, and count one, without assignments and gates.

    What COMPILED names counts as compiled. Once in a process, where Megatron is not imported yet.
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.cuda_stand_in import Tally, install, watch

    install()
    import torch
    from support import device_budgets

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
        # Gates are counted in the first step, which the count of a step does not see.
        with device_budgets.gates_alone() as gates, compiled_functions() as compiled:
            step = device_budgets.measure(command_line(system, **size), model="")["step"]
    finally:
        base.priced_assignment = assign
    micro_batches = size.get("micro_batches", 1)
    apart = [(tally, 1 / STEPS) for tally in calls]
    for parts_of_it, whole in compiled:
        apart += [(parts_of_it, 1 / STEPS), (whole, -1 / STEPS)]
    apart += [(tally, micro_batches) for _, tally in gates]
    return Count(
        samples=size["samples"],
        experts=size["experts"],
        parameters=expected(system, **size)["total_parameters"],
        micro_batches=micro_batches,
        operators=step["operators"] - sum(sum(t.operators.values()) * n for t, n in apart),
        bytes=1e6 * step["megabytes"] - sum(tally.bytes * number for tally, number in apart),
        assignments=len(calls) // STEPS // micro_batches,
        gates=dict(Counter(kind for kind, _ in gates)),
    )


@contextlib.contextmanager
def compiled_functions() -> Iterator[list[tuple[Any, Any]]]:
    """Count each call of what COMPILED names as it runs here, and as it is when it is compiled.

    Yields:
        Both tallies of each call, filled as the model runs.
    """
    importlib.import_module("megatron.training.initialize")  # which warms up the originals
    from support.cuda_stand_in import Tally, watch
    from torch.utils._pytree import tree_leaves

    calls: list[tuple[Tally, Tally]] = []

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any) -> Any:
            size = _bytes(tree_leaves(args))  # before a function that works in place
            with watch() as tally:
                answer = function(*args)
            whole = Tally(Counter({function.__name__: 1}), bytes=size + _bytes(tree_leaves(answer)))
            calls.append((tally, whole))
            return answer

        return counted

    with contextlib.ExitStack() as stack:
        for module, names in COMPILED.items():
            for name in names:
                function = getattr(importlib.import_module(module), name)
                stack.enter_context(mock.patch(f"{module}.{name}", counting(function)))
        yield calls


def _bytes(leaves: Sequence[Any]) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if hasattr(leaf, "numel"))


def measure(systems: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each system, the counts of its small versions, and what its full size is known to have.

    Each version has a process of its own, which takes what is left of its matrices with it.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for system in systems:
            experts = SYSTEMS[system]
            counts = [
                processes.submit(
                    count_step, system, samples=samples, experts=2 * samples if experts else 0,
                    width=SMALL_WIDTH, micro_batches=micro_batches,
                )
                for micro_batches in (1, 2)
                for samples in (1, 2)
            ]  # fmt: skip
            known = expected(system)
            yield (
                system,
                {
                    "small": [asdict(count.result()) for count in counts],
                    "experts": experts,
                    "parameters": known["total_parameters"],
                    "parameters_of_gpu": known["per_gpu"]["parameters"],
                    "flops": 3e12 * SAMPLES * known["forward_needed_tflops_per_1024_tokens"],
                },
            )


def table(found: dict[str, Any]) -> str:
    """Markdown, one line a system."""
    lines = [
        "| system | operators | GB | TFLOP | launches | memory | compute | update | MFU |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for system, values in found.items():
        row = row_of(values)
        cells = [
            system,
            f"{row.operators:,.0f}",
            f"{row.gigabytes:.0f}",
            f"{row.teraflops:.1f}",
            *(f"{time:.0f}" for time in (row.launches, row.memory, row.compute)),
            f"{row.update:.1f}",
            f"{row.mfu:.0%}".replace("%", " %"),
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
