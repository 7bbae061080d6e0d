"""Short trainings of every system, one against another: devices, resumes, precisions, layouts."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from collections import Counter
from importlib.util import find_spec

from support.first_gpu.notes import Notes, Place
from support.first_gpu.training import (
    NUM_STEPS,
    Watch,
    interrupted,
    on_ranks,
    train,
    words,
)
from support.launches import REPOSITORY, run_command, steps
from support.systems import SYSTEMS

ROUNDING = 0.02
"""Relative: bf16 has three digits, and other devices and implementations add in another order."""
RECOMPUTED = 1e-3
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "ep2": "--expert-model-parallel-size 2",
    "dp2": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
}
SPARSE = "smlp_deterministic"
"""The system of the cases that need one: gating, chunks and token experts."""


def cpu_losses(place: Place, notes: Notes) -> None:
    """Every system on the CPU, which the suite holds: what the GPU has to give."""
    if place.on_cpu:
        notes.not_run("losses of a CPU: it stands in for the GPU, and would be its own reference")
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for system in SYSTEMS:
        train(words(place, system), place.folder / "cpu" / system)
        notes.passed(f"{system}: {NUM_STEPS} steps")


def trains(place: Place, notes: Notes, *, system: str) -> None:
    """Steps, host synchronisations, memory, save and resume; against the CPU's losses."""
    folder, flags = place.folder / system, words(place, system)
    watch = Watch()
    around = contextlib.nullcontext if place.on_cpu else watch.installed
    straight = train(flags, folder / "straight", around=around)
    notes.check(len(straight) == NUM_STEPS, f"{len(straight)} steps in bf16")
    if place.on_cpu:
        notes.not_run("host synchronisations: torch counts them on CUDA alone")
        notes.not_run("peak memory: torch measures that of CUDA alone")
        notes.not_run("against the CPU's losses: they are these")
    else:
        _say_synchronisations(notes, watch.lines)
        _compare_memory(notes, flags)
        reference = place.folder / "cpu" / system
        if (reference / "metrics.jsonl").is_file():
            expected = steps(reference)
            notes.same_steps("against the CPU", straight, expected, tolerance=ROUNDING)
        else:
            notes.not_run("against the CPU's losses: case cpu_losses left none")
    resumed = interrupted(flags, folder)
    notes.same_steps("saved and resumed", resumed, straight, tolerance=RECOMPUTED)


def _say_synchronisations(notes: Notes, counted: Counter[str]) -> None:
    notes.data["synchronisations"] = dict(counted)
    # All steps but the first are watched.
    per_step = sum(counted.values()) / (NUM_STEPS - 1)
    most = ", ".join(f"{line} ({count})" for line, count in counted.most_common(4))
    notes.passed(f"host synchronisations: {per_step:.1f} a step: {most or 'none'}")


def _compare_memory(notes: Notes, flags: str) -> None:
    """The peak of this process against tools/estimate.py, which counts no temporary tensors."""
    import torch

    peak = torch.cuda.max_memory_allocated()
    estimated = estimated_memory(flags)
    notes.data["memory"] = {"peak": peak, "estimated": estimated}
    text = f"peak memory {peak / 2**20:.0f} MiB, estimated {estimated / 2**20:.0f} MiB"
    notes.passed(f"{text}: {peak / estimated:.2f} times")


def estimated_memory(flags: str) -> int:
    """Bytes, by tools/estimate.py's arithmetic for the same flags on one GPU."""
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
    """Activations that are computed twice are the same ones."""
    for system in ("smlp_partial", "switch"):
        folder, flags = place.folder / "recompute" / system, words(place, system)
        plain = train(flags, folder / "none")
        for kind, flag in {"full": FULL, "selective": "--recompute-granularity selective"}.items():
            again = train(f"{flags} {flag}", folder / kind)
            notes.same_steps(f"{system}, {kind}", again, plain, tolerance=RECOMPUTED)


def dropout(place: Place, notes: Notes) -> None:
    """The device's random numbers are resumed too."""
    flags = f"{words(place, 'amlp')} --hidden-dropout 0.1 --attention-dropout 0.1"
    straight = train(flags, place.folder / "dropout" / "straight")
    resumed = interrupted(flags, place.folder / "dropout")
    notes.same_steps("saved and resumed with dropout", resumed, straight, tolerance=RECOMPUTED)


def async_save(place: Place, notes: Notes) -> None:
    """A checkpoint that is written in the background is the same."""
    folder, flags = place.folder / "async_save", words(place, SPARSE)
    straight = train(flags, folder / "straight")
    resumed = interrupted(f"{flags} --async-save", folder)
    notes.same_steps("--async-save and resumed", resumed, straight, tolerance=RECOMPUTED)


def fp16(place: Place, notes: Notes) -> None:
    """The loss scale comes down within a few steps and the losses are those of bf16."""
    if place.on_cpu:
        notes.not_run("--fp16: it needs a CUDA device")
        return
    folder = place.folder / "fp16"
    expected = train(words(place, SPARSE), folder / "bf16")
    scale = "--initial-loss-scale 1024"  # the default would skip the updates of the first steps
    ours = train(f"{words(place, SPARSE, precision='--fp16')} {scale}", folder / "fp16")
    notes.same_steps("against bf16", ours, expected, tolerance=ROUNDING)


def transformer_engine(place: Place, notes: Notes) -> None:
    """Its layers against Megatron's own."""
    if place.on_cpu:
        notes.not_run("Transformer Engine: it needs a CUDA device")
        return
    if find_spec("transformer_engine") is None:
        notes.not_run("Transformer Engine: it is not installed")
        return
    _check_signatures(notes)
    for system in SYSTEMS:
        folder, flags = place.folder / "transformer_engine" / system, words(place, system)
        local = train(f"{flags} --transformer-impl local", folder / "local")
        ours = train(f"{flags} --transformer-impl transformer_engine", folder / "te")
        notes.same_steps(f"{system} against local", ours, local, tolerance=ROUNDING)


def _check_signatures(notes: Notes) -> None:
    """The stand-in, which the suite has on a CPU, takes no argument that the package lacks."""
    import transformer_engine.pytorch as te

    code = (
        "import json; from transformer_engine.signatures import MODULES\n"
        "print(json.dumps({name: sum(of, ()) for name, of in MODULES.items()}))"
    )
    stand_in = REPOSITORY / "tests" / "support" / "transformer_engine_stub"
    told = json.loads(run_command([sys.executable, "-c", code], PYTHONPATH=str(stand_in)).stdout)
    for name, arguments in told.items():
        classes = inspect.getmro(getattr(te, name))
        known = {argument for c in classes for argument in inspect.signature(c.__init__).parameters}
        lacking = ", ".join(sorted({*arguments} - known))
        notes.check(not lacking, f"arguments of {name} as the suite has them: lacks {lacking}")


def one_process(place: Place, notes: Notes) -> None:
    """Train in one process: the layouts start from its checkpoint, and must give its losses."""
    folder, flags = place.folder / "layouts", words(place, SPARSE)
    short = f"--train-iters 1 --lr-decay-iters {NUM_STEPS} --no-save-optim --no-save-rng"
    seed = flags.replace(f"--train-iters {NUM_STEPS}", short)
    train(f"{seed} --save {folder / 'seed'}", folder / "seed_log")
    found = train(_from_seed(place), folder / "one")
    notes.check(len(found) == NUM_STEPS, f"{len(found)} steps from a seed checkpoint")


def _from_seed(place: Place) -> str:
    load = f"--load {place.folder / 'layouts' / 'seed'}"
    return f"{words(place, SPARSE)} {load} --finetune --no-load-optim --no-load-rng"


def layout(place: Place, notes: Notes, *, name: str) -> None:
    """Two processes against one."""
    if not place.on_cpu:
        import torch

        if torch.cuda.device_count() < 2:
            notes.not_run(f"{name}: it needs two GPUs, and here is one")
            return
    folder = place.folder / "layouts"
    ours = on_ranks(place, 2, f"{_from_seed(place)} {LAYOUTS[name]}", folder / name, notes)
    notes.same_steps("against one process", ours, steps(folder / "one"), tolerance=ROUNDING)
