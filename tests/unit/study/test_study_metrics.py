"""A study reads the same records of a run as the plots, and its last step at little cost."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_smlp.study import metrics


def write(folder: Path, *lines: str) -> None:
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def step(iteration: int, loss: float) -> str:
    return json.dumps({"iteration": iteration, "loss": loss}) + "\n"


def evaluation(iteration: int, loss: float) -> str:
    return json.dumps({"iteration": iteration, "validation_loss": loss}) + "\n"


def test_a_run_that_has_not_begun(tmp_path: Path):
    assert metrics.read_records(tmp_path) == []
    iteration, loss = metrics.last_step(tmp_path)
    assert iteration == 0
    assert math.isnan(loss)


def test_what_a_later_line_replaces_is_not_there_twice(tmp_path: Path):
    write(
        tmp_path, step(1, 5.0), step(2, 4.0), evaluation(2, 4.5), step(2, 3.9), evaluation(2, 4.4)
    )
    assert [record.get("loss") for record in metrics.read_records(tmp_path)] == [5.0, 3.9, None]
    assert metrics.validation_at(tmp_path, 2) == {"iteration": 2, "validation_loss": 4.4}
    assert metrics.validation_at(tmp_path, 3) is None


def test_the_last_step_is_in_the_end_of_the_file(tmp_path: Path):
    many = [step(number, 1.0 + number) for number in range(1, 5000)]
    write(tmp_path, *many, evaluation(4999, 2.0), '{"iteration": 50')
    assert (tmp_path / "metrics.jsonl").stat().st_size > 2 * metrics.TAIL_BYTES
    assert metrics.last_step(tmp_path) == (4999, 5000.0)
