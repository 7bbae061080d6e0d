"""Quiet timings: their rounds, their file, the machine's name, and what they decide."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.studies import claims_and_text, loss_of, pretend, state_of, write_study

from megatron_smlp.errors import UsageError
from megatron_smlp.study import hardware as hardware_module
from megatron_smlp.study import process, results, speed
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.hardware import hardware
from megatron_smlp.study.results import Results
from megatron_smlp.study.state import State


def timing(steps: dict[str, list[float]], gemm: list[float]) -> list[dict[str, object]]:
    """Return lines of speed.csv from each system's seconds per step in each round."""
    return [
        {"system": name, "round": number + 1, "seconds_per_iteration": step,
         "tokens_per_second": 2048 / step, "tflops": 0.1, "gemm_tflops": gemm[number],
         "processes": 1, "threads": 1, "steps": 40}
        for name, own in steps.items()
        for number, step in enumerate(own)
    ]  # fmt: skip


def timed(
    known: State, folder: Path, own: list[float], others: list[float], gemm: list[float]
) -> tuple[dict[str, dict], str]:
    """Return the report of a study whose subject takes other step times than its rivals."""
    pretend(known, loss_of)
    steps = {"transformer": others, "switch": others, "smlp_deterministic": own}
    Results(folder / "results").add_speed(timing(steps, gemm))
    return claims_and_text(known, folder)


def test_time_is_tokens_times_step_time(known: State, tmp_path: Path):
    claims, text = timed(known, tmp_path, [0.51, 0.5, 0.52], [1.01, 1.02, 1.03], [0.4] * 3)
    assert (claims["C2"]["verdict"], claims["C3"]["verdict"]) == ("confirmed", "confirmed")
    costs = known.systems["smlp_deterministic"].costs
    numbers = [f"{costs[name]:,}" for name in ("total_parameters", "active_parameters")]
    forward = ("forward_tflops_per_1024_tokens", "forward_needed_tflops_per_1024_tokens")
    numbers += [f"{costs[name]:.5f}" for name in forward]
    # Half of 2e-3; 2048 tokens in 0.51 s; 0.1 of 0.4 TFLOP/s.
    numbers += ["0.001 (edge)", "4,016", "25%", "BASE: greedy, nothing is dropped"]
    assert f"| smlp_deterministic | {' | '.join(numbers)} |" in text
    assert f"Quiet timing, and all times from it, are of {hardware()}, " in text
    assert claims["C2"]["comparisons"][0]["difference"]["mean"] == pytest.approx(0.458, abs=0.01)


def test_a_time_is_as_uncertain_as_its_timing(known: State, tmp_path: Path):
    """The seeds agree on a sixth fewer tokens, but the rounds are far apart."""
    claims, _ = timed(known, tmp_path, [0.7, 1.1, 0.75, 1.2], [1.0] * 4, [0.4] * 4)
    found = claims["C2"]["comparisons"][0]["difference"]
    assert found["low"] < 0.75
    assert found["high"] > 1
    assert claims["C2"]["verdict"] == "undecided"


def test_rounds_with_a_slow_product_do_not_count(known: State, tmp_path: Path):
    gemm = [0.4, 0.2, 0.4, 0.41]
    claims, text = timed(known, tmp_path, [0.5] * 4, [1.0, 9.0, 1.0, 1.0], gemm)
    found = claims["C3"]["comparisons"][0]["difference"]
    assert (found["mean"], found["n"]) == (pytest.approx(0.5), 3)
    assert "Of 12 timings 3 are left out: that product, just before, had less than 75%" in text
    assert f"are of {hardware()}, 1 thread a process." in text


def test_a_rival_that_was_not_timed_leaves_it_open(known: State, tmp_path: Path):
    pretend(known, loss_of)
    steps = {"transformer": [1.0] * 3, "smlp_deterministic": [0.5] * 3}
    Results(tmp_path / "results").add_speed(timing(steps, [0.4] * 3))
    claims, _ = claims_and_text(known, tmp_path)
    [comparison] = claims["C3"]["comparisons"]
    assert (comparison["rival"], comparison["verdict"]) == ("switch", "undecided")


@pytest.mark.parametrize("count", [1, 8])
def test_workers_with_gpus_of_their_own_share_a_folder(count: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "hardware", lambda: f"amd-epyc-{count}x-nvidia-h100")
    assert results.default_folder("mine").name == "amd-epyc-nvidia-h100"


def test_two_quiet_rounds_decide_nothing(known: State, tmp_path: Path):
    claims, text = timed(known, tmp_path, [0.5] * 3, [1.0, 9.0, 1.0], [0.4, 0.2, 0.4])
    assert claims["C3"]["verdict"] == "undecided"
    assert "| C3 | step time: smlp_deterministic / switch |" in text
    assert "* C3 is undecided, 2 of the 3 rounds that a verdict takes." in text


@pytest.mark.parametrize(("step", "ended"), [(1.3, "undecided"), (0.7, "confirmed")])
def test_a_bound_confirms_and_never_refutes(tmp_path: Path, step: float, ended: str):
    """With one horizon only the step time is known; fewer tokens would have been enough."""
    known = state_of(write_study(tmp_path, horizons=["200K"]), runs=tmp_path / "runs")
    others = [1.01, 1.0, 1.02]
    claims, _ = timed(known, tmp_path, [step * x for x in others], others, [0.4] * 3)
    [comparison] = claims["C2"]["comparisons"]
    assert claims["C2"]["verdict"] == comparison["verdict"] == ended
    assert comparison["is_bound"]
    assert comparison["difference"]["low"] == 0
    assert comparison["difference"]["high"] == pytest.approx(step, rel=0.05)


@pytest.mark.parametrize(
    "changed", [{}, {"processes": 2}, {"threads": 2}, {"steps": 20}, {"hardware": "another"}]
)
def test_rounds_of_one_kind_are_put_together(tmp_path: Path, changed: dict[str, Any]):
    Results(tmp_path).add_speed(timing({"switch": [3.0, 3.0]}, [0.4] * 2))
    Results(tmp_path).speed.assign(**changed).to_csv(tmp_path / "speed.csv", index=False)
    Results(tmp_path).add_speed(timing({"switch": [1.0]}, [0.4]))
    found = Results(tmp_path).speed
    assert list(found["seconds_per_iteration"]) == ([1.0] if changed else [3.0, 3.0, 1.0])
    assert len(set(found["round"])) == len(found)


@pytest.mark.parametrize(
    ("visible", "name"),
    [(None, "-2x-nvidia-h100-80gb-hbm3"), ("1", "-1x-nvidia-h100-80gb-hbm3"), ("", "")],
)
def test_a_machine_is_named_by_its_gpus_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, name: str
):
    """Two machines with the same processor but different GPUs do not share a folder."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf 'NVIDIA H100 80GB HBM3\\nNVIDIA H100 80GB HBM3\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setattr(hardware_module, "_cpuinfo", lambda: "model name\t: AMD EPYC 7B13\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.__wrapped__() == f"amd-epyc-7b13{name}"
    driver.unlink()
    assert hardware.__wrapped__() == "amd-epyc-7b13"


def test_a_timing_is_the_fastest_of_the_later_half(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps = [1.0, 8.0, 7.0, 6.0, 1.5, 50.0, 1.2, 9.0, 1.3]

    def trained(command: list[str], *, folder: Path, **_: object) -> int:
        flags = yaml.safe_load((folder / "flags.yaml").read_text())
        assert flags["train-iters"] == known.study.speed.steps
        assert [name for name in flags if name.startswith("lr-")] == []
        lines = [
            {"iteration": number, "loss": 5.0, "seconds_per_iteration": step,
             "tokens_per_second": 100 / step, "tflops_per_device": 10 / step}
            for number, step in enumerate(steps)
        ]  # fmt: skip
        lines.append({"iteration": len(steps), "validation_loss": 5.0})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return 0

    monkeypatch.setattr(process, "run_command", trained)
    monkeypatch.setattr(StudyData, "flags", [])
    data, system = StudyData(tmp_path), known.systems["transformer"]
    found = speed._time(known, system, data, processes=1)
    expected = {"seconds_per_iteration": 1.2, "tokens_per_second": 100 / 1.2, "tflops": 10 / 1.2}
    assert found == pytest.approx(expected)
    monkeypatch.setattr(process, "run_command", lambda *_, **__: 1)
    with pytest.raises(UsageError, match=r"timing transformer failed \(1\)"):
        speed._time(known, system, data, processes=1)
