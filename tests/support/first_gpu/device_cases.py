"""Cases of the device: its environment, and the operators of megatron_smlp/ops on it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from support.first_gpu.notes import Notes, Place
from support.first_gpu.sabotage import installed
from support.launches import import_benchmarks

CLOCKS = "name,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current"


def environment(place: Place, notes: Notes) -> None:
    """Note what runs: the sources by checksum, the installed packages, the machine."""
    import torch

    from megatron_smlp.platform import cpu
    from megatron_smlp.provenance import made_by, version_of

    made = made_by()
    notes.data = {"commit": made["commit"] or "none: no repository", "package": made["sources"]}
    packages = ("torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "triton")
    notes.data["python"] = sys.version.split()[0]
    notes.data |= {name: version_of(name) or "not installed" for name in packages}
    notes.data["CUDA of torch"] = str(torch.version.cuda)
    if place.on_cpu:
        notes.not_run("devices: --device cpu, the CPU stands in for a GPU")
        return
    notes.data["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        memory = f"{of.total_memory / 2**30:.0f} GiB, capability {of.major}.{of.minor}"
        notes.data[f"device {number}"] = f"{of.name}, {memory}"
    notes.data["driver"] = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    notes.data["clocks and power"] = nvidia_smi(f"--query-gpu={CLOCKS}", "--format=csv")
    notes.data["topology"] = nvidia_smi("topo", "-m")
    before = torch.cuda.current_device, torch.empty
    cpu.apply()
    notes.check((torch.cuda.current_device, torch.empty) == before, "no name is a CPU's")
    notes.passed(f"{torch.cuda.device_count()} devices")


def nvidia_smi(*arguments: str) -> str:
    """Return its output."""
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return done.stdout.strip()


def operators(place: Place, notes: Notes) -> None:
    """Check spatial gating's products and their gradients against fp64, and the assignment."""
    import torch

    from megatron_smlp.ops import causal_mix, toeplitz_mix

    lengths = (63, 300) if place.on_cpu else (63, 1000, 2047)
    for length in lengths:
        for dtype, rounding in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
            for product, reference, shape in (
                (causal_mix.causal_mix, causal_mix.causal_mix_reference, (length, length)),
                (toeplitz_mix.toeplitz_mix, toeplitz_mix.toeplitz_mix_reference, (length,)),
            ):
                worst = _rounding(place, product, reference, shape, dtype)
                what = f"{product.__name__}, T = {length}, {str(dtype).removeprefix('torch.')}"
                notes.check(worst <= rounding, f"{what}: {worst:.1e} of the largest value")
    with installed():
        _check_assignment(place, notes)


def _rounding(place: Place, product: Any, reference: Any, shape: Any, dtype: Any) -> float:
    """Return the largest error of output and gradients, relative to each one's largest value."""
    import torch

    length = shape[0]
    weight = torch.randn(2, *shape, dtype=torch.float64) / length**0.5
    values, upstream = (torch.randn(2, length, 48, dtype=torch.float64) for _ in range(2))
    exact = _with_gradients(reference, weight, values, upstream)
    moved = (tensor.to(place.device, dtype) for tensor in (weight, values, upstream))
    pairs = zip(_with_gradients(product, *moved), exact, strict=True)
    return max(float((one.double().cpu() - e).abs().max() / e.abs().max()) for one, e in pairs)


def _with_gradients(product: Any, weight: Any, values: Any, upstream: Any) -> tuple[Any, ...]:
    import torch

    weight, values = weight.requires_grad_(), values.requires_grad_()
    output = product(weight, values)
    return output.detach(), *torch.autograd.grad(output, (weight, values), upstream)


def _check_assignment(place: Place, notes: Notes) -> None:
    import torch

    from megatron_smlp.ops.balanced_assignment import balanced_assignment

    scores = torch.randn(1000, 8)
    experts = balanced_assignment(scores.to(place.device))
    notes.check(experts.device.type == place.device, f"balanced assignment on {experts.device}")
    chosen = experts.cpu()
    notes.check(bool((chosen.bincount(minlength=8) == 125).all()), "125 tokens to each expert")
    best = scores.gather(1, balanced_assignment(scores)[:, None]).sum()
    share = float(scores.gather(1, chosen[:, None]).sum() / best)
    notes.check(share >= 0.995, f"its sum is {share:.4f} of the CPU's")


def kernel_times(place: Place, notes: Notes) -> None:
    """Time fused code against the operators it replaces, as benchmarks/bench_gpu_kernels.py."""
    import_benchmarks()
    from bench_gpu_kernels import TINY, Sizes, measured

    sizes, repeats = (TINY, 2) if place.on_cpu else (Sizes(), 10)
    for record in measured(sizes, place.device, repeats=repeats):
        times = f"{record['ours_ms']:.3f} ms, the other {record['peer_ms']:.3f} ms"
        notes.data[record["case"]] = times
    notes.check(len(notes.data) == 6, f"{len(notes.data)} pairs timed, of 6")
