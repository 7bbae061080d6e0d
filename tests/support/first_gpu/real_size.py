"""Models of configs/paper/regular with their files' flags: speed, memory, where the time goes.

On a CPU in place of a GPU they are tiny, and the measurements are meaningless.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from support.first_gpu.model_cases import estimated_memory
from support.first_gpu.notes import Notes, Place
from support.first_gpu.training import train
from support.launches import import_benchmarks, records

SYSTEMS = ("transformer", "gmlp", "smlp_deterministic")
NUM_STEPS = 20
WARM_UP = 8
PROFILED = (19, 20)
"""Steps that are profiled; their time is not counted."""
TOP = 20
TINY = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 256 --seq-length 32 --micro-batch-size 2
    --global-batch-size 4 --num-workers 0
"""
TINY_OF = {
    "transformer": "--num-attention-heads 4",
    "gmlp": "",
    "smlp_deterministic": "--num-dense-layers 1 --num-experts 4 --moe-ffn-hidden-size 256",
}
MEMORY = 0.15
"""Relative tolerance; tools/estimate.py counts no temporary tensors."""
ROOM = 0.9
"""Share of the GPU's memory that the estimate may take."""


def real_size(place: Place, notes: Notes, *, system: str) -> None:
    """Train twenty steps; check for finite losses and the estimated memory; measure the rest."""
    import torch

    import_benchmarks()
    from bench_gpu import flags as benchmark_flags

    flags = f"{benchmark_flags(system)} --train-iters {NUM_STEPS} --log-interval 1"
    if place.on_cpu:
        flags = f"{flags} {TINY} {TINY_OF[system]}"
    estimated = estimated_memory(flags)
    if not place.on_cpu:
        memory = torch.cuda.get_device_properties(0).total_memory
        if estimated > ROOM * memory:
            sizes = f"{estimated / 2**30:.0f} of {memory / 2**30:.0f} GiB"
            notes.not_run(f"{system} at this size: it needs {sizes}")
            return
    profile = Profile()
    folder = place.folder / "real_size" / system
    steps = train(flags, folder, around=profile.installed)
    is_finite = all(math.isfinite(step.loss) for step in steps)
    notes.check(is_finite and len(steps) == NUM_STEPS, f"{len(steps)} steps, finite losses")
    lines = [record for record in records(folder) if "loss" in record]
    _say_speed(notes, lines[WARM_UP : PROFILED[0] - 1])
    notes.data["losses"] = [step.loss for step in steps]
    notes.data["kernels"] = profile.top(on_cpu=place.on_cpu)
    notes.passed(f"most time: {'; '.join(notes.data['kernels'][:3])}")
    if place.on_cpu:
        notes.not_run("idle share and peak memory: torch measures those of CUDA alone")
        return
    notes.passed(f"the GPU is idle for {profile.idle_share():.1%} of a profiled step")
    peak = torch.cuda.max_memory_allocated()
    sizes = f"peak memory {peak / 2**30:.2f} GiB, estimated {estimated / 2**30:.2f} GiB"
    notes.check(abs(peak / estimated - 1) <= MEMORY, f"{sizes}; {MEMORY:.0%} are allowed")


def _say_speed(notes: Notes, lines: list[dict[str, Any]]) -> None:
    names = ("tokens_per_second", "tflops_per_device", "mfu")
    known = {name: [line[name] for line in lines if line[name] is not None] for name in names}
    measured = {name: statistics.median(values) for name, values in known.items() if values}
    notes.data |= measured
    share = f"{measured['mfu']:.1%}" if "mfu" in measured else "unknown: no data sheet's peak"
    tokens, tflops = measured["tokens_per_second"], measured["tflops_per_device"]
    notes.passed(f"{tokens:,.0f} tokens/s, {tflops:.1f} TFLOP/s, MFU {share}")


class Profile:
    """Records PROFILED steps, and how long they took."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self.profiler: Any = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        from megatron_smlp.megatron_patches.wrapping import wrapped_in
        from megatron_smlp.training.step import Step

        with wrapped_in((Step, "__call__", self._profiling)):
            yield

    def _profiling(self, make_step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            import torch

            self.steps += 1
            if self.steps == PROFILED[0]:
                torch.cuda.synchronize()
                self.profiler = torch.profiler.profile()
                self.profiler.start()
                self.seconds = -time.perf_counter()
            outcome = make_step(*args, **kwargs)
            if self.steps == PROFILED[-1]:
                torch.cuda.synchronize()
                self.seconds += time.perf_counter()
                self.profiler.stop()
            return outcome

        return wrapped

    def _events(self, *, on_cpu: bool) -> list[tuple[float, int, str]]:
        """Return ms, calls and name of each kernel (on a CPU, of each operator), longest first."""
        from torch.autograd import DeviceType

        kind = DeviceType.CPU if on_cpu else DeviceType.CUDA
        attribute = "self_cpu_time_total" if on_cpu else "self_device_time_total"
        events = [event for event in self.profiler.key_averages() if event.device_type == kind]
        rows = [(getattr(event, attribute) / 1e3, event.count, event.key) for event in events]
        return sorted(rows, reverse=True)

    def top(self, *, on_cpu: bool) -> list[str]:
        """Return the kernels that take most time, in readable form."""
        rows = self._events(on_cpu=on_cpu)
        total = sum(milliseconds for milliseconds, _, _ in rows) or 1.0
        return [
            f"{spent:.2f} ms ({spent / total:.1%}), {count} x {name[:80]}"
            for spent, count, name in rows[:TOP]
        ]

    def idle_share(self) -> float:
        """Return the idle share of the profiled time; kernels that overlap count twice."""
        busy = sum(milliseconds for milliseconds, _, _ in self._events(on_cpu=False)) / 1e3
        return max(0.0, 1 - busy / self.seconds)
