"""Estimate what a study will cost: hours at a speed measured here, or at an assumed one on GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_smlp.accounting.estimate import estimate, uncounted
from megatron_smlp.command_line import flag_of
from megatron_smlp.study.cells import number
from megatron_smlp.study.plan import Calendar, PlannedRun
from megatron_smlp.study.study_file import Study
from megatron_smlp.study.systems import System
from megatron_smlp.study.tables import Tables

GIB = 2**30
BACKWARD = 3  # a training step costs as much as three forward passes
EVAL_ITERS = 100  # Megatron's default


def price_lines(
    study: Study, systems: Mapping[str, System], runs: Sequence[PlannedRun], tables: Tables
) -> Iterator[str]:
    """Yield the lines of a table of what each system's runs cost.

    Args:
        runs: the runs that are left to do.

    Raises:
        UsageError: a system cannot be partitioned over this many GPUs.
    """
    if study.cluster is None:
        yield from _hours_of_a_worker(systems, runs, tables, study)
        return
    cluster = study.cluster
    share = f"{cluster.utilization:.0%} of {cluster.tflops:g} TFLOP/s in needed FLOPs, assumed"
    yield f"{cluster.gpus} GPUs ({share}), evaluations included"
    yield f"  {'':24}{'GPU hours':>12}{'hours':>9}{'memory/GPU':>14}"
    total = 0.0
    for name, system in systems.items():
        # In needed FLOPs, like a training's logged `mfu`, which may be given as `utilization`.
        tflops = BACKWARD * system.costs["forward_needed_tflops_per_1024_tokens"] / 1024
        tokens = _tokens(study, system, runs)
        hours = tflops * tokens / (cluster.tflops * cluster.utilization) / 3600
        total += hours
        flags = {**system.flags, "vocab_size": study.vocab_size, "world_size": cluster.gpus}
        memory = estimate(flags)["per_gpu"]["memory_bytes"] / GIB
        yield f"  {name:24}{hours:>12,.0f}{hours / cluster.gpus:>9,.1f}{memory:>10,.1f} GiB"
    yield f"  {'all':24}{total:>12,.0f}{total / cluster.gpus:>9,.1f}"
    ignored = {name for system in systems.values() for name in uncounted(system.flags)}
    if ignored:
        yield f"  not counted in the memory: {', '.join(map(flag_of, sorted(ignored)))}"


def _hours_of_a_worker(
    systems: Mapping[str, System], runs: Sequence[PlannedRun], tables: Tables, study: Study
) -> Iterator[str]:
    yield f"{'hours of one worker':32}{'tokens/s':>12}{'left to do':>14}"
    total = 0.0
    for name, system in systems.items():
        speed = tables.tokens_per_second(name)
        hours = _tokens(study, system, runs) / speed / 3600
        total += hours
        yield f"  {name:30}{number(speed, ',.0f'):>12}{number(hours, ',.1f'):>14}"
    yield f"  {'all':42}{number(total, ',.1f'):>14}"
    yield (
        "  evaluations included; tokens/s: of the quiet timing, or else as trained; n/a: "
        "nothing has run yet"
    )


def _tokens(study: Study, system: System, runs: Sequence[PlannedRun]) -> float:
    """Return the tokens of a system's runs, plus the cost of their evaluations in such tokens."""
    calendar = Calendar.of(study, system)
    iterations = sum(run.end - run.start for run in runs if run.system == system.name)
    evaluated = system.flags.get("eval_iters", EVAL_ITERS) / BACKWARD / calendar.evaluation
    return float((1 + evaluated) * calendar.batch * iterations)
