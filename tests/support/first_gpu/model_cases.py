"""Compare short trainings of every system across devices, resumes, precisions and layouts."""

from __future__ import annotations

import contextlib
import inspect
import runpy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from support.first_gpu.launched import OF_SYSTEMS, check_launches, counted
from support.first_gpu.notes import Notes, Place
from support.first_gpu.reference import (
    Reference,
    Run,
    compare,
    forget_checkpoints,
    saved_run,
)
from support.first_gpu.training import (
    NUM_STEPS,
    RESUMED_FROM,
    SPARSE,
    Watch,
    first_gradients,
    from_seed,
    no_context,
    on_ranks,
    resumed,
    run_flags,
    saving,
    train,
)
from support.launches import REPOSITORY
from support.systems import SYSTEMS

RECOMPUTED = 1e-3
GRAPHED = ("gmlp", SPARSE)
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
GRAPHS = "--cuda-graph-impl local --allow-untested-flag cuda-graph-impl"


@dataclass(frozen=True)
class Layout:
    """Number of GPUs, flags, and where the run starts (training.STARTS)."""

    ranks: int
    flags: str
    start: str = "layouts"


TP, PP = "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"
OVERLAPS = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
EP8 = f"--expert-model-parallel-size 8 {OVERLAPS}"
LAYOUTS = {
    "tp2": Layout(2, TP),
    "pp2": Layout(2, PP),
    "ep2": Layout(2, "--expert-model-parallel-size 2"),
    "dp2": Layout(2, OVERLAPS),
    "pp2_interleaved": Layout(2, f"{PP} --num-layers-per-virtual-pipeline-stage 1"),
    "tp2_ep2": Layout(4, f"{TP} --expert-model-parallel-size 2"),
    "ep8": Layout(8, EP8, "eight"),
    "ep8_uneven": Layout(8, EP8, "uneven"),
}


def trains(place: Place, notes: Notes, *, system: str) -> None:
    """Train, save and resume; note host synchronisations and memory; compare with the CPU."""
    folder, flags = place.folder / system, run_flags(place, system)
    watch, launches = Watch(), Counter[str]()

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        with watch.installed(), counted() as counts:
            yield
        launches.update(counts)

    run = saved_run(flags, folder, around=no_context if place.on_cpu else watched)
    notes.check(len(run.steps) == NUM_STEPS, f"{len(run.steps)} steps in bf16")
    if place.on_cpu:
        notes.not_run("host synchronisations: torch counts them on CUDA alone")
        notes.not_run("peak memory: torch measures that of CUDA alone")
        notes.not_run("kernels: a CPU computes their parts")
    else:
        check_launches(notes, launches, OF_SYSTEMS.get(system, ()))
        _say_synchronisations(notes, watch.lines)
        _compare_memory(notes, flags, watch.peak)
    compare(notes, "against the CPU", run, Reference.read(place, system))
    _check_resumption(notes, "saved and resumed", flags, folder, run)


def _check_resumption(notes: Notes, what: str, flags: str, folder: Path, run: Run) -> None:
    """Compare a run resumed from the first save with the one that saved; drop its checkpoints."""
    again = resumed(flags, folder)
    notes.same_steps(what, again, run.steps[RESUMED_FROM:], tolerance=RECOMPUTED)
    forget_checkpoints(folder)


def _say_synchronisations(notes: Notes, counted: Counter[str]) -> None:
    notes.data["synchronisations"] = dict(counted)
    # All steps but the first are watched.
    per_step = sum(counted.values()) / (NUM_STEPS - 1)
    most = ", ".join(f"{line} ({count})" for line, count in counted.most_common(4))
    notes.passed(f"host synchronisations: {per_step:.1f} a step: {most or 'none'}")


def _compare_memory(notes: Notes, flags: str, peak: int) -> None:
    """Note the steps' peak against tools/estimate.py, which counts no temporary tensors."""
    estimated = estimated_memory(flags)
    notes.data["memory"] = {"peak": peak, "estimated": estimated}
    text = f"peak memory {peak / 2**20:.0f} MiB, estimated {estimated / 2**20:.0f} MiB"
    notes.passed(f"{text}: {peak / estimated:.2f} times")


def estimated_memory(flags: str) -> int:
    """Return the bytes that tools/estimate.py computes for the same flags on one GPU."""
    from support.in_process import forget_arguments

    from megatron_smlp.accounting.costs import ModelShape
    from megatron_smlp.accounting.footprint import footprint
    from megatron_smlp.accounting.ranks import ParallelLayout
    from pretrain_smlp import patched_arguments

    try:
        args = patched_arguments(flags.split())
        return footprint(ModelShape.from_args(args), ParallelLayout.from_args(args)).memory_bytes
    finally:
        forget_arguments()


def recompute(place: Place, notes: Notes) -> None:
    """Check that recomputed activations are the same."""
    for system in ("smlp_partial", "switch"):
        folder, flags = place.folder / "recompute" / system, run_flags(place, system)
        plain = train(flags, folder / "none")
        for kind, flag in {"full": FULL, "selective": "--recompute-granularity selective"}.items():
            again = train(f"{flags} {flag}", folder / kind)
            notes.same_steps(f"{system}, {kind}", again, plain, tolerance=RECOMPUTED)


def dropout(place: Place, notes: Notes) -> None:
    """Check that a resume restores the device's random state too."""
    folder = place.folder / "dropout"
    flags = f"{run_flags(place, 'amlp')} --hidden-dropout 0.1 --attention-dropout 0.1"
    run = saved_run(flags, folder)
    _check_resumption(notes, "saved and resumed with dropout", flags, folder, run)


def async_save(place: Place, notes: Notes) -> None:
    """Check that a checkpoint written in the background is the same."""
    folder, flags = place.folder / "async_save", run_flags(place, SPARSE)
    run = saved_run(f"{flags} --async-save", folder)
    compare(notes, "--async-save, against the CPU", run, Reference.read(place, SPARSE))
    _check_resumption(notes, "--async-save and resumed", flags, folder, run)


def fp16(place: Place, notes: Notes) -> None:
    """Check that the loss scale fits from the first step and rounding does not exceed bf16's."""
    if place.on_cpu:
        notes.not_run("--fp16: it needs a CUDA device")
        return
    folder = place.folder / "fp16"
    scale = "--initial-loss-scale 1024"  # the default would skip the updates of the first steps
    run = saved_run(f"{run_flags(place, SPARSE, precision='--fp16')} {scale}", folder)
    compare(notes, "against the CPU's bf16", run, Reference.read(place, SPARSE))
    forget_checkpoints(folder)


def transformer_engine(place: Place, notes: Notes) -> None:
    """Compare Transformer Engine's layers with the CPU's, which are Megatron's own."""
    if place.on_cpu:
        notes.not_run("Transformer Engine: it needs a CUDA device")
        return
    if find_spec("transformer_engine") is None:
        notes.not_run("Transformer Engine: it is not installed")
        return
    _check_signatures(notes)
    runs = {system: (system, "") for system in SYSTEMS}
    runs["grouped GEMM"] = SPARSE, "--moe-grouped-gemm"
    for name, (system, more) in runs.items():
        folder, flags = place.folder / "transformer_engine" / name, run_flags(place, system)
        run = saved_run(f"{flags} --transformer-impl transformer_engine {more}", folder)
        compare(notes, f"{name}, against the CPU", run, Reference.read(place, system))
        forget_checkpoints(folder)


def cuda_graphs(place: Place, notes: Notes) -> None:
    """Train with Megatron's graphs of the layers that do not route, and compare with the CPU."""
    if place.on_cpu:
        notes.not_run("CUDA graphs: they need a CUDA device")
        return
    for system in GRAPHED:
        folder = place.folder / "cuda_graphs" / system
        run = saved_run(f"{run_flags(place, system)} {GRAPHS}", folder)
        compare(notes, f"{system}, against the CPU", run, Reference.read(place, system))
        forget_checkpoints(folder)


def _check_signatures(notes: Notes) -> None:
    """Check that the suite's CPU stand-in takes no argument that the package lacks."""
    import transformer_engine.pytorch as te

    stub = REPOSITORY / "tests" / "support" / "transformer_engine_stub" / "transformer_engine"
    for name, arguments in runpy.run_path(str(stub / "signatures.py"))["MODULES"].items():
        classes = inspect.getmro(getattr(te, name))
        known = {argument for c in classes for argument in inspect.signature(c.__init__).parameters}
        lacking = ", ".join(sorted({*arguments.split()} - known))
        notes.check(not lacking, f"arguments of {name} as the suite has them: lacks {lacking}")


def layout(place: Place, notes: Notes, *, name: str) -> None:
    """Train on ranks of this machine, from the checkpoint that the reference started from."""
    folder, asked = place.folder / name, LAYOUTS[name]
    flags = f"{saving(from_seed(place, asked.start), folder)} {asked.flags}"
    steps = on_ranks(place, asked.ranks, flags, folder / "log", notes)
    if steps:
        run, known = Run(steps, first_gradients(folder)), Reference.read(place, asked.start)
        compare(notes, "against one process on the CPU", run, known)
    forget_checkpoints(folder)
