"""Count small versions of each system on the stand-in, for roofline.py, which explains how."""

from __future__ import annotations

import contextlib
import functools
import importlib
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
"""Experts per layer."""
SAMPLES, TOKENS, WIDTH, VOCABULARY = 8, 1024, 1024, 50304
GPUS, MICRO_BATCHES = 8, 8  # --global-batch-size 512
COMPILED = {
    "megatron.core.fusions.fused_cross_entropy": (
        "calculate_logits_max",
        "calculate_predicted_logits",
        "calculate_cross_entropy_loss",
        "calculate_gradients",
    ),
    "megatron.core.fusions.fused_bias_dropout": ("bias_dropout_add_fused_train",),
}
"""By `jit_fuser`. Autograd runs the last one's backward, which is counted as it is."""
SMALL_WIDTH, STEPS = 64, 4
RUN = f"""
    --mock-data --tokenizer-type NullTokenizer --num-workers 0 --no-resume --eval-iters 0
    --train-iters {STEPS} --log-interval 100 --lr-warmup-iters 0
"""


@dataclass(frozen=True)
class Count:
    """Counts of one step of a small version, without balanced assignments and gates."""

    samples: int
    experts: int
    parameters: int
    micro_batches: int
    operators: float
    bytes: float
    assignments: int
    """Calls of balanced assignment per micro-batch."""
    gates: Mapping[str, int]
    """Number of gates, by kind."""


def changes(
    system: str, *, samples: int, experts: int, width: int, micro_batches: int = 1
) -> dict[str, Any]:
    """Return what a version of this width overrides in the file; the rest follows from these."""
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
    """Return what tools/estimate.py says; without a size, for the file itself, on its GPUs."""
    from megatron_smlp.accounting.estimate import estimate
    from megatron_smlp.flags.yaml_file import read_yaml

    values = read_yaml(CONFIGS / f"{system}.yaml")
    values = {name.replace("-", "_"): value for name, value in values.items()}
    if size:
        return estimate(values | changes(system, **size))
    spread = GPUS if SYSTEMS[system] else 1
    layout = {"world_size": GPUS, "expert_model_parallel_size": spread}
    return estimate(values | layout | {"expert_tensor_parallel_size": 1})


def products_of(system: str) -> dict[str, Any]:
    """Return a micro-batch's FLOPs by kind of product, and how often its tokens go to an expert."""
    from megatron_smlp.accounting import costs
    from megatron_smlp.accounting.estimate import resolve
    from megatron_smlp.flags.yaml_file import read_yaml

    values = read_yaml(CONFIGS / f"{system}.yaml")
    args = resolve({name.replace("-", "_"): value for name, value in values.items()})
    shape = costs.ModelShape.from_args(args)
    choices = costs.choices_per_token(shape)
    flops = {"dense": 0.0, "grouped": choices * shape.seq_length * costs.choice_flops(shape)}
    whole = replace(shape, prefix_length=0)  # the same products, of all rows
    for slots in shape.slots:
        kind = "attention" if slots.mixer == "attention" else "gate"
        above = costs.layer_cost(whole, slots).above_flops
        causal = above * shape.triangle / (shape.square - shape.triangle)
        flops[kind] = flops.get(kind, 0.0) + causal
    flops["dense"] = costs.model_cost(shape).flops - sum(flops.values())
    times = 3 * SAMPLES * TOKENS / shape.seq_length
    return {
        "flops_by_kind": {kind: times * number for kind, number in flops.items()},
        "choices": choices,
    }


def command_line(system: str, **size: int) -> str:
    """Return the flags of pretrain_smlp.py for a small version."""
    changed = changes(system, **size)
    words = [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]
    if system == "hash":
        words.append("--no-hash-table")  # the table counts the tokens of a dataset
    return f"--config {CONFIGS / system}.yaml {RUN} {' '.join(words)}"


def count_step(system: str, **size: int) -> Count:
    """Train four steps on the stand-in, and count one, without assignments and gates.

    What COMPILED names counts as compiled. Call once per process, before Megatron is imported.
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
        """Return any balanced assignment, as all make the same layer."""
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
    """Count each call of what COMPILED names as it runs here, and as it would run compiled.

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
            size = _bytes(tree_leaves(args))  # before the call, which may work in place
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
    """Yield each system's counts of its small versions, and the known figures of its full size.

    Each version runs in a process of its own, whose exit frees what is left of its matrices.
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
                    **products_of(system),
                },
            )
