"""Benchmarks run what a user could run, and derive their figures from its log."""

import runpy
import sys
from collections.abc import Callable
from typing import Any

import bench_gpu
import bench_scaling
import pytest

from megatron_smlp.accounting.costs import ModelShape, model_cost

BYTES_PER_PARAMETER = 18  # bf16 weights, fp32 gradients, master copy and two moments


@pytest.mark.parametrize("system", bench_gpu.SYSTEMS)
def test_the_gpus_models_are_accepted_and_fit_80_gb(parse: Callable[..., Any], system: str) -> None:
    args = parse(f"{bench_gpu.flags(system)} --train-iters 20", base="")
    assert args.bf16
    assert args.train_iters > bench_gpu.WARM_UP
    cost = model_cost(ModelShape.from_args(args))
    assert cost.parameters * BYTES_PER_PARAMETER < 50e9


@pytest.mark.parametrize("script", ["bench_gpu", "bench_gpu_kernels"])
def test_without_a_gpu_it_says_so_and_ends_well(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(script, run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out == f"{script}: skipped, there is no CUDA device\n"


@pytest.mark.parametrize(
    "point",
    [
        bench_scaling.Point(sweep, system, sizes[0])
        for sweep, (_, systems, sizes) in bench_scaling.SWEEPS.items()
        for system in systems
    ],
    ids=lambda point: point.name,
)
def test_the_scaling_points_are_accepted_and_counted(
    parse: Callable[..., Any], point: bench_scaling.Point
) -> None:
    args = parse(point.flags(steps=3), base="")
    assert args.global_batch_size * args.seq_length == bench_scaling.TOKENS
    shape = ModelShape.from_args(args)
    assert 3 * model_cost(shape).flops / args.seq_length == point.flops_per_token()
