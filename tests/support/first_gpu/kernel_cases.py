"""Check every kind of launch against fp64: outputs, gradients, and the same bits twice.

A kernel's error may be ALLOWED times that of its reference in the same precision, or one rounding
of the largest value. Without a GPU, Triton interprets the kernels, at small sizes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from support.first_gpu.launched import check_launches, counted
from support.first_gpu.notes import Notes, Place
from support.first_gpu.sabotage import installed
from support.launches import import_benchmarks

if TYPE_CHECKING:
    import torch
    from support.gating import Gate
    from torch import Tensor

ALLOWED = 3
"""Factor on the largest error of the reference in the same precision."""
type Answer = tuple[list[float], bool, Counter[str]]
"""Errors of the output and of each gradient, in units of what is allowed; whether the second call
gave the same bits; launches."""


def kernels(place: Place, notes: Notes) -> None:
    """Check the gate, the norm with means and grouped experts, and what each launches."""
    import torch

    gates, norms = variants(place)
    calls = [("gate_answer", gate) for gate in gates.values()]
    calls += [("norm_answer", gate) for gate in norms.values()]
    names = [*gates, *norms]
    if place.on_cpu:
        from support.interpreted import interpreted

        module = "support.first_gpu.kernel_cases"
        answers = interpreted([(f"{module}:{name}", (gate, "cpu")) for name, gate in calls])
    elif torch.cuda.get_device_capability() < (8, 0):
        notes.not_run("kernels of the gate: they need capability 8.0 or more")
        answers, names = [], []
    else:
        answers = [globals()[name](gate, place.device) for name, gate in calls]
    launches: Counter[str] = Counter()
    for name, answer in zip(names, answers, strict=True):
        _note(notes, name, answer)
        launches += answer[2]
    answer = experts_answer(place)
    _note(notes, "experts, unequal and empty groups, bf16", answer)
    launches += answer[2]
    if place.on_cpu:
        kinds = ("gate", "parts of dM", "norm")
        missing = [kind for kind in kinds if not any(kind in key for key in launches)]
        notes.check(not missing, f"{launches.total()} launches, interpreted")
        notes.not_run("compiled kernels: the CPU interprets them")
    else:
        check_launches(notes, launches, ("gate", "parts of dM", "norm", "grouped"))


def _note(notes: Notes, name: str, answer: Answer) -> None:
    errors, is_same, _ = answer
    worst = max(errors)
    notes.check(worst <= 1, f"{name}: {worst:.2f} of the error that is allowed")
    if not is_same:
        notes.failed(f"{name}: other bits in a second call")


def variants(place: Place) -> tuple[dict[str, Gate], dict[str, Gate]]:
    """Return the variants of the gate, and of the norm with means, by name."""
    import torch
    from support.gating import Gate

    tokens, batch = (40, 2) if place.on_cpu else (1000, 4)
    bf16, fp16 = torch.bfloat16, torch.float16
    # Each compiles a dozen kernels; M alternates between fp32 and the dtype of v.
    shapes = [(1, 128, bf16), (4, 64, bf16), (4, 64, fp16), (8, 32, bf16), (3, 20, fp16)]
    shapes += [(4, 16, fp16), (3, 20, bf16)]
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"garbage": True},
        "added": {"has_added": True},
        "GELU and norm": {"normed": True},
        "GELU, norm, added": {"normed": True, "has_added": True},
        "routed": {"experts": 4, "prefix": tokens // 7},
    }
    gates, norms = {}, {}
    for number, (heads, width, dtype) in enumerate(shapes):
        # The last one's rows begin at odd offsets.
        length = tokens if place.on_cpu or number + 1 < len(shapes) else 2047
        size = f"{heads} x {width}, T = {length}, {str(dtype).removeprefix('torch.')}"
        weights = (torch.float32, dtype)[number % 2]
        # If interpreted, one kind per shape.
        asked = [list(kinds)[number % len(kinds)]] if place.on_cpu else list(kinds)
        for kind in asked:
            options = kinds[kind]
            gates[f"{kind}, {size}"] = Gate(length, batch, heads, width, dtype, weights, **options)
        if not place.on_cpu or heads == 3:
            norm = Gate(length, batch, heads, width, dtype, normed=True)
            norms[f"norm with means, {size}"] = norm
    many = {"added": (1, 1100, {}), "routed": (4, 1050, {"experts": 3, "prefix": tokens // 7})}
    for kind, (heads, width, options) in many.items():
        size = f"{heads} x {width}, T = {tokens}, bfloat16"
        gates[f"dM in parts, {kind}, {size}"] = Gate(
            tokens, batch, heads, width, bf16, bf16, **(options or kinds[kind])
        )
    return gates, norms


def gate_answer(gate: Gate, device: str) -> Answer:
    from support.gating import by_kernels, exactly

    rounded = exactly(gate, gate.dtype)
    return _answer(lambda: by_kernels(gate, device), exactly(gate), rounded, gate.dtype)


def norm_answer(gate: Gate, device: str) -> Answer:
    from support.gating import norm_by_kernels, norm_exactly

    exact, rounded = norm_exactly(gate), norm_exactly(gate, gate.dtype)
    return _answer(lambda: norm_by_kernels(gate, device), exact, rounded, gate.dtype)


def _answer(
    call: Callable[[], list[Tensor]],
    exact: Sequence[Tensor],
    rounded: Sequence[Tensor],
    dtype: torch.dtype,
) -> Answer:
    import torch

    with counted() as launches, installed():
        ours, again = call(), call()
    is_same = all(torch.equal(first, second) for first, second in zip(ours, again, strict=True))
    known = zip(ours, exact, rounded, strict=True)
    unit = torch.finfo(dtype).eps / 2
    return [_share(*tensors, unit) for tensors in known], is_same, launches


def _share(ours: Tensor, exact: Tensor, rounded: Tensor, unit: float) -> float:
    """Return the largest error, in units of what is allowed; infinity for NaN."""
    scale = float(exact.abs().max()) or 1.0
    error, known = (
        float((tensor.double().cpu() - exact).abs().max()) for tensor in (ours, rounded)
    )
    share = error / max(ALLOWED * known, unit * scale)
    return share if share == share else float("inf")


def experts_answer(place: Place) -> Answer:
    """Compare grouped products of experts with separate ones, for groups of different sizes."""
    import torch

    counts = torch.tensor([5, 0, 11, 2] if place.on_cpu else [700, 0, 3, 1297])
    with _experts(place) as experts:
        hidden = torch.randn(int(counts.sum()), experts.config.hidden_size).bfloat16()
        upstream = torch.randn_like(hidden)

        def gradients(layer: Any, compute: str, device: str, dtype: torch.dtype) -> list[Tensor]:
            moved = hidden.detach().to(device, dtype).requires_grad_()
            output = getattr(layer, compute)(moved, counts.to(device))
            inputs = [moved, *layer.parameters()]
            asked = upstream.to(device, dtype)
            return [output.detach(), *torch.autograd.grad(output, inputs, asked)]

        cpu = experts.to("cpu")
        rounded = gradients(cpu, "one_by_one", "cpu", torch.bfloat16)
        exact = gradients(cpu.double(), "one_by_one", "cpu", torch.float64)
        ours = cpu.bfloat16().to(place.device)
        can_group = place.on_cpu or torch.cuda.get_device_capability()[0] in (9, 10)
        compute = "grouped" if can_group else "one_by_one"
        return _answer(
            lambda: gradients(ours, compute, place.device, torch.bfloat16),
            exact,
            rounded,
            torch.bfloat16,
        )


@contextlib.contextmanager
def _experts(place: Place) -> Iterator[Any]:
    import_benchmarks()
    from bench_gpu_kernels import TINY, Sizes, build_experts, one_rank

    sizes = TINY if place.on_cpu else Sizes(hidden=256, expert=1024)
    with one_rank(place.device):
        yield build_experts(sizes, 4, "cpu")
