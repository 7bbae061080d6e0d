"""The small parts of reporting: units, files that a crash cut off, the start-up output."""

import contextlib
import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_smlp.metrics_records import MetricsFile
from megatron_smlp.training import speed
from megatron_smlp.training.captured_output import CapturedOutput, FolderError
from megatron_smlp.training.reporting import perplexity
from megatron_smlp.training.speed import StepClock, device_peak_tflops, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (12.4, "12s"), (59.6, "1m00s"), (200, "3m20s"), (3599.6, "1h00m"), (3725, "1h02m")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_step_is_timed_without_what_is_excluded(monkeypatch: pytest.MonkeyPatch):
    """10 s over 2 steps, 4 s of them saving; then 1 step of 5 s, counted from the last reading."""
    clock = 100.0
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock))
    steps = StepClock()
    for _ in range(2):
        steps.step()
        steps.exclude(2.0)
    clock += 10
    assert steps.pop_seconds_per_step() == 3
    steps.step()
    clock += 5
    assert steps.pop_seconds_per_step() == 5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA B200", 2250),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", 148),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_of_the_device_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    assert device_peak_tflops() == peak


def test_perplexity_of_a_loss_that_is_too_large_is_infinite():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


class TestMetricsFile:
    def test_lines_are_json_also_for_numbers_that_json_lacks(self, tmp_path: Path):
        metrics = MetricsFile(str(tmp_path / "new" / "folder"))
        metrics.write({"iteration": 1, "loss": math.nan, "mfu": None, "perplexity": math.inf})
        text = (tmp_path / "new" / "folder" / "metrics.jsonl").read_text()
        record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert record == {"iteration": 1, "loss": "nan", "mfu": None, "perplexity": "inf"}

    def test_a_resumed_run_replaces_what_came_after_its_checkpoint(self, tmp_path: Path):
        """Steps after the save and the half line of a killed run go; the rest stays."""
        metrics = MetricsFile(str(tmp_path))
        for iteration in range(1, 6):
            metrics.write({"iteration": iteration, "loss": 1.0})
        with metrics.path.open("a") as file:
            file.write('{"iteration": 3, "routers": [{"layer": 2}')
        assert metrics.newest() == 5
        assert metrics.fields_at(3) == {"iteration", "loss"}
        metrics.drop_after(3)
        metrics.write({"iteration": 4, "loss": 2.0})
        lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
        expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
        assert [(line["iteration"], line["loss"]) for line in lines] == expected
        dropped = metrics.path.with_name("metrics.jsonl.dropped").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in dropped[:2]] == [4, 5]
        assert dropped[2:] == ['{"iteration": 3, "routers": [{"layer": 2}']

    def test_a_second_restart_from_one_checkpoint_knows_the_time_too(self, tmp_path: Path):
        """The record of the first restart has no time itself."""
        metrics = MetricsFile(str(tmp_path))
        metrics.write({"iteration": 3, "wall_seconds": 3600.0})
        metrics.write({"iteration": 4, "wall_seconds": 4000.0})
        assert metrics.drop_after(3)["wall_seconds"] == 3600.0
        metrics.write({"iteration": 3, "restart": "a rank"})
        assert metrics.drop_after(3)["wall_seconds"] == 3600.0


class TestCapturedOutput:
    def test_it_keeps_what_was_said_before_and_after_the_folder_is_known(self, tmp_path: Path):
        with CapturedOutput() as output:
            print("early")
            warnings.simplefilter("always")
            warnings.warn("a warning", stacklevel=1)
            output.open(str(tmp_path), rank=0)
            print("late")
        text = (tmp_path / "megatron.log").read_text()
        assert text.index("early") < text.index("UserWarning: a warning") < text.index("late")

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path):
        (tmp_path / "file").touch()
        with CapturedOutput() as output, pytest.raises(FolderError, match=r"--log-dir .*/file"):
            output.open(str(tmp_path / "file"), rank=0)

    def test_afterwards_everything_is_as_before(self, tmp_path: Path):
        before = (sys.stdout, warnings.showwarning)
        output = CapturedOutput()
        with contextlib.suppress(KeyError), output:
            output.open(str(tmp_path), rank=0)
            raise KeyError
        assert (sys.stdout, warnings.showwarning) == before
        # Library logging still goes to the output: it must find the file open.
        output.write("after the end\n")
        assert (tmp_path / "megatron.log").read_text().endswith("after the end\n")
