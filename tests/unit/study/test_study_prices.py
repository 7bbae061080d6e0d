"""A plan estimates a study's cost; every command of the paper's studies can start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.launches import REPOSITORY
from support.meta_models import built_parameters, expected_parameters
from support.studies import state_of, write_study

from megatron_smlp.accounting.estimate import estimate
from megatron_smlp.study.cli import main
from megatron_smlp.study.plan import Calendar

PAPER = ("paper", "paper_large")


def planned(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[list[str]]:
    assert main(["plan", str(path), *more]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_gpu_hours_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """GPUs are so slow and the vocabulary so large that the printed figures have three digits."""
    cluster = {"gpus": 2, "tflops": 1e-4, "utilization": 0.5}
    fixed = {"bf16": True, "eval-iters": 20, "micro-batch-size": 4, "global-batch-size": 8}
    path = write_study(tmp_path, cluster=cluster, fixed=fixed, **{"vocab-size": 8_000_000})
    lines = planned(path, capsys, "--runs", str(tmp_path / "runs"))
    state = state_of(path, runs=tmp_path / "runs")
    system = state.systems["transformer"]
    costs = estimate(system.flags | {"vocab_size": 8_000_000, "world_size": 2})
    row = next(cells for cells in lines if cells[:1] == ["transformer"] and len(cells) == 5)
    tokens = int(row[3].replace(",", ""))
    [priced] = [cells for cells in lines if cells[:1] == ["transformer"] and "GiB" in cells]
    # Training: 3 forward passes of this many tokens; an evaluation: one of 20 batches of 8 samples;
    # all at half of 1e-4 TFLOP/s.
    evaluated = tokens * 20 / Calendar.of(state.study, system).evaluation
    tflops = costs["forward_needed_tflops_per_1024_tokens"] * (3 * tokens + evaluated) / 1024
    hours = tflops / 5e-5 / 3600
    gpu_hours, wall, memory = (float(priced[n].replace(",", "")) for n in (1, 2, 3))
    assert hours > 100
    assert gpu_hours == pytest.approx(hours, rel=0.01)
    assert wall == pytest.approx(hours / 2, rel=0.01)
    assert memory == pytest.approx(costs["per_gpu"]["memory_bytes"] / 2**30, rel=0.01)


SYSTEMS = [
    pytest.param(
        study, system,
        marks=[] if (study, system) == ("paper_large", "smlp_partial") else [pytest.mark.slow],
    )
    for study in PAPER
    for system in yaml.safe_load((REPOSITORY / "studies" / f"{study}.yaml").read_text())["systems"]
]  # fmt: skip


@pytest.mark.parametrize(("study", "system"), SYSTEMS)
def test_the_papers_commands_can_start(
    parse: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    study: str,
    system: str,
):
    """They pass all checks, ours and Megatron's, and one rank of the cluster builds its model."""
    known = state_of(REPOSITORY / "studies" / f"{study}.yaml", runs=tmp_path)
    assert known.study.cluster is not None
    monkeypatch.setenv("WORLD_SIZE", str(known.study.cluster.gpus))
    plan = known.plan()
    runs = [run for run in (*plan.runs, *plan.pending) if run.system == system]
    for run in {run.end: run for run in runs}.values():
        flags = tmp_path / "flags.yaml"
        flags.write_text(yaml.safe_dump(dict(run.flags)), encoding="utf-8")
        argv = "--mock-data --tokenizer-type NullTokenizer --vocab-size 50257"
        args = parse(f"--config {flags} {argv}", base="")
    args.rank = 0
    assert built_parameters(args, monkeypatch) == expected_parameters(args, stage=0)
