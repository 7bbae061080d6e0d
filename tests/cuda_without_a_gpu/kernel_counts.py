"""Print as JSON what kernels ask of a CUDA device for which the CPU stands in.

Runs in a separate process: Triton interprets, and the device stays until the process ends.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from support.cuda_stand_in import install, launched, watch
from support.device_budgets import gates_alone
from support.interpreted import quick_interpreter

install()
quick_interpreter(launched)

import torch  # noqa: E402 - behind the device

RUN = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --num-layers 1 --hidden-size 64
    --ffn-hidden-size 1024 --seq-length 128 --attention-dropout 0 --hidden-dropout 0 --bf16
    --micro-batch-size 2 --global-batch-size 2 --num-workers 0 --lr 1e-3 --log-interval 1
    --lr-decay-style constant --eval-iters 0 --train-iters 1 --no-resume
"""
GATES = {
    "one head": "--architecture amlp --tiny-attention-width 16",
    "eight heads": "--architecture gmlp --spatial-heads 8",
    "partial prediction": "--architecture smlp --feature-router partial --num-feature-chunks 8 "
    "--num-feature-experts 4 --prefix-fraction 0.2 --num-dense-layers 0",
}


def assignment() -> dict[str, Any]:
    from megatron_smlp.ops.balanced_assignment import priced_assignment

    scores = torch.randn(96, 8, device="cuda")
    with watch() as tally:
        experts, prices = priced_assignment(scores)
    counts = experts.cpu().bincount(minlength=8).tolist()
    return _record(tally) | {"counts": counts, "on": [str(experts.device), str(prices.device)]}


def training(flags: str) -> dict[str, Any]:
    """Train a step with the kernels and one without: loss, norm, one gate's costs."""
    from megatron_smlp.ops import triton_ready

    answers = {"kernels": _trained(flags)}
    missing = triton_ready._missing
    triton_ready._missing = lambda: "this run is without"
    try:
        return answers | {"parts": _trained(flags)}
    finally:
        triton_ready._missing = missing


def _trained(flags: str) -> dict[str, Any]:
    from support.runs import forget_run

    from pretrain_smlp import main

    try:
        with gates_alone() as gates, tempfile.TemporaryDirectory() as folder:
            main([*RUN.split(), *flags.split(), "--log-dir", folder])
            lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    finally:
        forget_run()
    [(_, tally)] = gates
    rows = [json.loads(line) for line in lines]
    [step] = [[row["loss"], row["grad_norm"]] for row in rows if "grad_norm" in row]
    return {"gate": _record(tally), "loss and norm": step}


def _record(tally: Any) -> dict[str, Any]:
    return {
        "operators": sum(tally.operators.values()),
        "launches": sum(n for name, n in tally.operators.items() if name.startswith("triton::")),
        "synchronisations": dict(tally.synchronisations),
        "bytes": tally.bytes,
    }


if __name__ == "__main__":
    gates = {name: training(flags) for name, flags in GATES.items()}
    print(json.dumps({"assignment": assignment(), "gates": gates}))
