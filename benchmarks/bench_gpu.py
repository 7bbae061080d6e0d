"""Time all systems on one CUDA GPU in bf16: tokens/s, TFLOP/s, MFU, share of measured GEMMs.

    make bench-gpu

The models are those of configs/paper/regular (equal FLOPs per token), with fewer experts of the
same width, so that weights and optimizer fit into 80 GB; a token visits equally many. A step is all
that `megatron.training` does for BATCH samples of 1,024 tokens. FLOPs are the needed ones, 3 x
forward with causal products as triangles. MFU is relative to the data sheet, as in metrics.jsonl;
with it comes the share of the best speed of some large bf16 GEMMs on this GPU.

Apex and Transformer Engine are used if installed, by the flags' own defaults. Without a CUDA device
the benchmark says so and exits.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hosted import ROOT, run
from timing import Record

EXPERTS = {"gshard": 16, "switch": 8, "base": 8, "hash": 8}
CONFIGS = sorted((ROOT / "configs/paper/regular").glob("*.yaml"))
SYSTEMS = tuple(path.stem for path in CONFIGS if path.stem != "minhash")
"""minhash's mixer reads hashes of the tokens' strings; here tokens are numbers."""
BATCH = 32
WARM_UP, LOGGED = 10, 5  # steps before anything counts, and steps per logged line
FLAGS = f"""
    --mock-data --tokenizer-type NullTokenizer --vocab-size 50256 --num-workers 2 --no-resume
    --eval-iters 0 --lr-warmup-iters 0 --global-batch-size {BATCH} --log-interval {LOGGED}
"""
GEMM_WIDTH, GEMM_CALLS, GEMM_TRIES = 8192, 20, 5


def flags(system: str) -> str:
    """Return the command line of one system, without how long it runs and where it logs."""
    words = f"--config {ROOT}/configs/paper/regular/{system}.yaml {FLAGS}"
    if system.startswith("smlp"):
        return f"{words} --num-experts 8"
    return f"{words} --num-experts {EXPERTS[system]}" if system in EXPERTS else words


def gemm_tflops() -> float:
    """Return the GPU's best speed at large square bf16 products."""
    import torch

    left, right = (
        torch.randn(GEMM_WIDTH, GEMM_WIDTH, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    out = torch.empty_like(left)
    best = float("inf")
    for _ in range(1 + GEMM_TRIES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(GEMM_CALLS):
            torch.mm(left, right, out=out)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return GEMM_CALLS * 2 * GEMM_WIDTH**3 / best / 1e9


def train(words: str) -> list[dict[str, Any]]:
    """Run `pretrain_smlp.py WORDS` in this process; return its logged steps."""
    sys.path.insert(0, str(ROOT))  # pretrain_smlp.py is not part of the package
    from pretrain_smlp import main

    with tempfile.TemporaryDirectory() as folder:
        main([*words.split(), "--log-dir", folder])
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def measure(system: str, repeats: int) -> Record:
    steps = WARM_UP + max(LOGGED, repeats)
    lines = train(f"{flags(system)} --train-iters {steps}")
    return as_record(system, lines, gemms=gemm_tflops())


def as_record(system: str, lines: list[dict[str, Any]], *, gemms: float) -> Record:
    """Return the record of `lines` of metrics.jsonl; gemms: TFLOP/s of large products. Its ratio is
    MFU, or for a GPU without a known data sheet, the share of `gemms`."""
    counted = [line for line in lines if line["iteration"] > WARM_UP]
    names = ("seconds_per_iteration", "tokens_per_second", "tflops_per_device")
    seconds, tokens, tflops = (statistics.median(line[name] for line in counted) for name in names)
    shares = [line["mfu"] for line in counted if line["mfu"] is not None]
    mfu = statistics.median(shares) if shares else None
    said = "MFU unknown" if mfu is None else f"MFU {mfu:.1%}"
    share = f"{tflops / gemms:.1%} of {gemms:.1f} TFLOP/s of large GEMMs"
    case = f"{system}: {tokens:,.0f} tokens/s, {tflops:.1f} TFLOP/s, {said}, {share}{_extras()}"
    ratio = tflops / gemms if mfu is None else mfu
    return Record(case=case, ours_ms=1e3 * seconds, peer_ms=1e3 * seconds * ratio, ratio=ratio)


def _extras() -> str:
    """Return the optional packages that the run could use, as text."""
    names = {"transformer_engine": "Transformer Engine", "apex": "Apex"}
    found = [name for module, name in names.items() if find_spec(module)]
    return f", with {' and '.join(found)}" if found else ""


if __name__ == "__main__":
    import torch

    if not torch.cuda.is_available():
        print("bench_gpu: skipped, there is no CUDA device")
        sys.exit(0)
    run(__doc__, SYSTEMS, measure, repeats=20)
