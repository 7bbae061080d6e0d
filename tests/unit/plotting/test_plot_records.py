"""Reading metrics.jsonl for a plot: restarts, overlap, and files that are not what they should."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_smlp.errors import UsageError
from megatron_smlp.plotting.records import default_labels, number, read_run, read_runs


def write(folder: Path, *records: dict[str, Any] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    path = folder / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def step(iteration: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"iteration": iteration, "loss": loss, **more}


def validation(iteration: int, loss: float) -> dict[str, Any]:
    return {"iteration": iteration, "validation_loss": loss}


def losses(records: list[dict[str, Any]], name: str = "loss") -> list[tuple[int, float]]:
    return [(record["iteration"], record[name]) for record in records]


class TestOverlap:
    def test_later_lines_replace_what_they_repeat(self, tmp_path: Path):
        """Stopped after 4, went on from 2: from 3 on, what counts is what the second part wrote."""
        first = [step(1), step(2), validation(2, 0.9), step(3, 3.0), step(4, 4.0)]
        second = [step(3, 0.3), step(4, 0.4), validation(4, 0.5), step(5, 0.6)]
        path = write(tmp_path, *first, validation(4, 9.0), *second)
        run = read_run(path, label="run")
        assert losses(run.training) == [(1, 1.0), (2, 1.0), (3, 0.3), (4, 0.4), (5, 0.6)]
        assert losses(run.validation, "validation_loss") == [(2, 0.9), (4, 0.5)]

    def test_a_validation_that_was_not_reached_again_goes_too(self, tmp_path: Path):
        path = write(tmp_path, step(1), step(5), validation(5, 9.0), step(2), step(3))
        run = read_run(path, label="run")
        assert losses(run.training) == [(1, 1.0), (2, 1.0), (3, 1.0)]
        assert run.validation == []

    def test_of_two_validations_of_a_step_the_last_counts(self, tmp_path: Path):
        path = write(tmp_path, step(1), validation(1, 2.0), validation(1, 3.0))
        assert losses(read_run(path, label="run").validation, "validation_loss") == [(1, 3.0)]


class TestBadInput:
    @pytest.mark.parametrize(
        "lines",
        [("{broken", step(2)), ("[1]", step(2)), ('{"loss": 1}', step(2)), (validation(1, 2.0),)],
    )
    def test_what_is_no_run_is_named(self, tmp_path: Path, lines: tuple[Any, ...]):
        path = write(tmp_path, *lines)
        with pytest.raises(UsageError, match=str(path)):
            read_run(path, label="run")
        with pytest.raises(UsageError, match=f"{tmp_path}/none"):
            read_run(tmp_path / "none", label="run")

    def test_half_a_line_at_the_end_is_that_of_a_running_run(self, tmp_path: Path):
        path = write(tmp_path, step(1), "", step(2), '{"iteration": 3, "lo')
        assert len(read_run(path, label="run").training) == 2

    def test_labels(self, tmp_path: Path):
        paths = [write(tmp_path / name, step(1)) for name in ("a", "b")]
        for labels in (["one"], ["one", "one"]):
            with pytest.raises(UsageError, match="one"):
                read_runs(paths, labels=labels)


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/switch", "runs/base"], ["switch", "base"]),
        (["runs/switch/metrics.jsonl", "runs/base"], ["switch", "base"]),
        (["switch/log", "base/log"], ["switch", "base"]),
        (["runs/one"], ["one"]),
    ],
)
def test_labels_are_where_the_paths_differ(paths: list[str], labels: list[str]):
    assert default_labels([Path(path) for path in paths]) == labels


def test_numbers_that_json_lacks():
    record = {"loss": "nan", "perplexity": "inf", "mfu": None}
    assert number(record, "perplexity") == float("inf")
    assert all(str(number(record, name)) == "nan" for name in ("loss", "mfu", "absent"))
