"""Count what a training step of each system asks of a CUDA device, with the CPU standing in.

    python tests/support/device_budgets.py benchmarks/results/device_budget.json [SYSTEM ...]

For one step of one micro-batch (T = 512, so that the triangular products use their blocks), counts
the operators that launch kernels, the times that the host waits for the device, and the bytes that
the operators read and write. A step spans all that the loop does up to the start of the next one,
without log lines, validation or checkpoints; the forward pass of each kind of layer is counted too.
The result holds only counts, made with one thread, so it is the same on every machine: with more
threads, sums round differently, and Switch drops other choices.

Triton kernels are missing, unless TRITON_INTERPRET=1 lets them run on the CPU, which takes some
minutes: device_budget_kernels.json is made this way.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

MODEL = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 500 --num-layers 4 --hidden-size 64
    --ffn-hidden-size 256 --seq-length 512 --attention-dropout 0 --hidden-dropout 0 --bf16
    --micro-batch-size 2 --global-batch-size 2 --num-workers 0 --lr 1e-3 --log-interval 100
    --eval-iters 0 --train-iters 4 --no-resume
"""
MEASURED = 3  # the measured step: after all one-time work

Record = dict[str, Any]


def measure(flags: str, *, model: str = MODEL) -> Record:
    """Train a few steps of one system and return what the measured one did.

    Args:
        flags: the system's, appended to those of the model and the run.
    """
    from support.cuda_stand_in import watch
    from support.runs import forget_run

    from megatron_smlp.architectures import SlottedLayer
    from megatron_smlp.training.step import Step
    from pretrain_smlp import main

    layers: dict[str, Record] = {}
    step: Record = {}
    tensors: Record = {}
    make_step, forward = Step.__call__, SlottedLayer.forward
    iteration, watching = 0, contextlib.ExitStack()

    @functools.wraps(make_step)
    def measured_step(self: Step, *args: Any) -> Any:
        nonlocal iteration
        iteration += 1
        if iteration == MEASURED:
            tally = watching.enter_context(watch())
            watching.callback(lambda: step.update(_record(tally)))
        elif iteration == MEASURED + 1:
            watching.close()
            tensors.update(_tensors(self.parts.model, self.parts.optimizer))
        return make_step(self, *args)

    @functools.wraps(forward)
    def measured_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        if iteration != MEASURED:
            return forward(self, *args, **kwargs)
        with watch() as tally:
            answer = forward(self, *args, **kwargs)
        layers[f"{type(self.self_attention).__name__} + {type(self.mlp).__name__}"] = _record(tally)
        return answer

    Step.__call__, SlottedLayer.forward = measured_step, measured_layer
    try:
        with tempfile.TemporaryDirectory() as folder:
            main([*model.split(), *flags.split(), "--log-dir", folder])
    finally:
        Step.__call__, SlottedLayer.forward = make_step, forward
        forget_run()
    return {"step": step, "layers": layers, "tensors": tensors}


@contextlib.contextmanager
def gates_alone() -> Iterator[list[tuple[str, Any]]]:
    """Count what each gate of a model asks for, forward and backward, on its first call.

    Yields:
        The kind and tally of each gate, filled in as the model runs.
    """
    import torch
    from support.cuda_stand_in import watch

    from megatron_smlp.layers.spatial_gating import SpatialGating

    gates: list[tuple[str, Any]] = []
    counted: set[int] = set()
    forward = SpatialGating.forward

    def counting(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and id(self) not in counted:  # a step, not the probe before it
            counted.add(id(self))
            u, _ = self.linear_fc1(hidden_states)
            u = u.detach().requires_grad_()
            parameters = [*self.norm.parameters(), *self.spatial.parameters()]
            upstream = torch.ones_like(u.chunk(2, dim=-1)[0])
            with watch() as tally:
                torch.autograd.grad(self.gate(u), [u, *parameters], upstream)
            gates.append((_kind_of_gate(self), tally))
        return forward(self, hidden_states, *args, **kwargs)

    SpatialGating.forward = counting
    try:
        yield gates
    finally:
        SpatialGating.forward = forward


def _kind_of_gate(layer: Any) -> str:
    if getattr(layer, "router", None) is not None:
        return "partial prediction"
    return "one head" if layer.local_heads == 1 else "heads"


def _tensors(models: list[Any], optimizer: Any) -> Record:
    """Count the tensors that a run holds, by device and dtype."""
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    states = [state for one in inner for state in one.state.values()]
    held = {
        "parameters": [p for model in models for p in model.parameters()],
        "gradients": [p.main_grad for model in models for p in model.parameters()],
        "buffers": [b for model in models for b in model.module.buffers()],
        "weights of the optimizer": [
            p for one in inner for group in one.param_groups for p in group["params"]
        ],
        "moments and steps": [value for state in states for value in state.values()],
    }
    return {
        kind: dict(sorted(collections.Counter(f"{t.device.type} {t.dtype}" for t in own).items()))
        for kind, own in held.items()
    }


def _record(tally: Any) -> Record:
    places: collections.Counter[str] = collections.Counter()
    for site, count in tally.synchronisations.items():
        places[site.rpartition(":")[0]] += count  # per file: lines move
    return {
        "operators": sum(tally.operators.values()),
        "synchronisations": sum(tally.synchronisations.values()),
        "megabytes": round(tally.bytes / 1e6, 1),
        "where the host waits": dict(sorted(places.items())),
    }


def budgets(systems: dict[str, str]) -> dict[str, Record]:
    return {system: measure(flags) for system, flags in systems.items()}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    from support.cuda_stand_in import install, launched

    install()
    if os.environ.get("TRITON_INTERPRET") == "1":
        from support.interpreted import quick_interpreter

        quick_interpreter(launched)
    from support.systems import SYSTEMS

    asked = sys.argv[2:] or SYSTEMS
    text = json.dumps(budgets({system: SYSTEMS[system] for system in asked}), indent=1)
    Path(sys.argv[1]).write_text(f"{text}\n", encoding="utf-8")
