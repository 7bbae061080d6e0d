"""Plots: records read from metrics.jsonl, series made of them, figures of these, the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smlp.errors import UsageError
from megatron_smlp.plotting.cli import main
from megatron_smlp.plotting.figures import load_figure, loss_figure, router_figure
from megatron_smlp.plotting.series import (
    AXES,
    Curve,
    Run,
    common_unit,
    curve,
    default_labels,
    read_run,
    smoothed,
)


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
        """The run stopped after 6 and resumed from 2: from 3 on, the second part's lines count."""
        first = [step(1), step(2), validation(2, 0.9), step(3, 3.0), step(6, 4.0), validation(6, 9)]
        second = [step(3, 0.3), step(4, 0.4), validation(4, 9.0), validation(4, 0.5), step(5, 0.6)]
        path = write(tmp_path, *first, *second)
        run = read_run(path, label="run")
        assert losses(run.training) == [(1, 1.0), (2, 1.0), (3, 0.3), (4, 0.4), (5, 0.6)]
        assert losses(run.validation, "validation_loss") == [(2, 0.9), (4, 0.5)]


class TestBadInput:
    @pytest.mark.parametrize(
        "lines",
        [
            *((line, step(2)) for line in ("{broken", "[1]", '{"loss": 1}')),
            ('{"iteration": 1, "loss": broken}', step(2)),
            (validation(1, 2.0),),
        ],
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


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/switch", "runs/base"], ["switch", "base"]),
        (["runs/switch/metrics.jsonl", "runs/base"], ["switch", "base"]),
        (["switch/log", "base/log"], ["switch", "base"]),
    ],
)
def test_labels_are_where_the_paths_differ(paths: list[str], labels: list[str]):
    assert default_labels([Path(path) for path in paths]) == labels


def router(layer: int, shares: list[float], *, kind: str = "token", **more: Any) -> dict[str, Any]:
    values = {"entropy": 0.9, "drop_rate": 0.1} | more
    return {"layer": layer, "kind": kind, "load_share": shares, **values}


def progress(iteration: int) -> dict[str, float]:
    return {
        "consumed_tokens": 2000 * iteration,
        "consumed_flops": 3e12 * iteration,
        "consumed_square_flops": 4e12 * iteration,
        "wall_seconds": 60.0 * iteration,
    }


def routed_lines(count: int = 3) -> list[dict[str, Any]]:
    """Layer 2's experts get 1/4 and 3/4, layer 4's 1/2 each; validations at every second step."""
    lines: list[dict[str, Any]] = []
    for iteration in range(1, count + 1):
        routers = [router(4, [0.5, 0.5]), router(2, [0.25, 0.75], entropy=0.7, drop_rate=0.2)]
        lines.append(step(iteration, 5.0 - iteration, **progress(iteration), routers=routers))
        if iteration % 2 == 0:
            more = {"validation_routers": [router(2, [1.0, 0.0])]} | progress(iteration)
            lines.append(validation(iteration, 4.5) | more)
    return lines


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write(tmp_path / "run", *routed_lines()), label="run")


class TestSeries:
    @pytest.mark.parametrize(
        ("name", "x", "label"),
        [
            ("tokens", [2, 4, 6], " (thousands)"),
            ("flops", [3, 6, 9], "T"),
        ],
    )
    def test_loss_against_each_axis(self, run: Run, name: str, x: list[float], label: str):
        unit, unit_name = common_unit([run], AXES[name])
        line = curve(run.training, axis=AXES[name], unit=unit, field="loss")
        assert (line.x.tolist(), line.y.tolist(), unit_name) == (x, [4, 3, 2], label)

    def test_losses_that_are_not_finite_are_left_out(self):
        records = [step(1, 2.0), step(2, "nan"), step(3, "inf"), step(4, None), {"iteration": 5}]
        line = curve(records, axis=AXES["steps"], unit=1, field="loss")
        assert line.x.tolist() == [1]

    def test_smoothing_averages_backwards(self):
        line = Curve(np.arange(4.0), np.array([4.0, 2.0, 0.0, 5.0]))
        assert smoothed(line, window=2).y.tolist() == [4, 3, 1, 2.5]
        assert smoothed(line, window=9).y.tolist() == pytest.approx([4, 3, 2, 2.75])
        assert smoothed(line, window=1) is line


class TestFigures:
    def test_loss_draws_the_series(self, run: Run):
        figure = loss_figure([run], axes=["steps", "time"], window=1)
        steps, time = figure.axes
        assert steps.get_xlabel() == "training steps"
        assert time.get_xlabel() == "wall time (minutes)"
        trained, validated = steps.get_lines()[:2]
        assert trained.get_xydata().tolist() == [[1, 4], [2, 3], [3, 2]]
        assert validated.get_xydata().tolist() == [[2, 4.5]]
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["run", "validation"]

    def test_load_draws_every_router(self, run: Run):
        figure = load_figure(run)
        second, fourth = (axes for axes in figure.axes if axes.get_title())
        assert second.get_title() == "layer 2, token router"
        (mesh,) = second.collections
        assert mesh.get_array().tolist() == [[0.5] * 3, [1.5] * 3]
        edges = mesh.get_coordinates()
        assert edges[0, :, 0].tolist() == [0.5, 1.5, 2.5, 3.5], "steps"
        assert edges[:, 0, 1].tolist() == [-0.5, 0.5, 1.5], "experts"
        assert fourth.get_title() == "layer 4, token router"

    def test_a_router_that_sent_nothing_meanwhile(self, tmp_path: Path):
        lines = routed_lines()
        del lines[0]["routers"][1]
        entropy, *_ = router_figure([read_run(write(tmp_path / "run", *lines), label="run")]).axes
        worst, *_ = entropy.lines
        assert worst.get_xdata().tolist() == [1, 2, 3]
        assert worst.get_ydata().tolist() == [0.9, 0.7, 0.7]

    def test_curves_draw_the_worst_router(self, run: Run):
        figure = router_figure([run])
        entropy, dropped = figure.axes
        assert entropy.get_lines()[0].get_ydata().tolist() == [0.7] * 3
        assert dropped.get_lines()[0].get_ydata().tolist() == [0.2] * 3
        assert entropy.get_lines()[1].get_xydata().tolist() == [[2, 0.9]], "of the validation"
        assert dropped.get_lines()[1].get_xydata().tolist() == [[2, 0.1]]
        assert dropped.get_ylim()[0] == 0, "a share that is never less"
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["run", "validation"]


class TestCommandLine:
    def test_files(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        runs = {"one": [step(1), step(2)], "two (b)": routed_lines()}
        paths = [write(tmp_path / name, *lines).parent for name, lines in runs.items()]
        output = tmp_path / "new" / "plots"
        flags = ["--output", str(output), "--smooth", "2", "--against", "steps", "tokens"]
        main([*map(str, paths), *flags])
        names = ["loss", "routers", "load-two_b_", "load-two_b_-validation"]
        starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
        written = [f"{output}/{name}.{kind}" for name in names for kind in starts]
        assert capsys.readouterr().out.splitlines() == written
        for path in map(Path, written):
            assert path.read_bytes().startswith(starts[path.suffix[1:]])


class TestParts:
    """A loss over all targets and one over a suffix never share an axis."""

    def drawn(self, runs: list[Run], *, suffix: bool) -> list[tuple[list[float], list[float]]]:
        """Return each run's y values: of its line and of its dots, as far as they are drawn."""
        panel = loss_figure(runs, axes=["steps"], window=1, suffix=suffix).axes[0]
        curves = [list(map(float, line.get_ydata())) for line in panel.lines]
        return [tuple(curves[2 * i : 2 * i + 2]) for i in range(len(runs))]

    def test_each_figure_has_one_kind(self, tmp_path: Path):
        partial = [
            step(1, 4.0, suffix_loss=4.0, whole_loss=5.0),
            validation(1, 5.5) | {"validation_suffix_loss": 4.5},
        ]
        dense = [
            step(1, 3.0, suffix_loss=2.9),
            validation(1, 3.5) | {"validation_suffix_loss": 3.4},
        ]
        runs = [
            read_run(write(tmp_path / name, *lines), label=name)
            for name, lines in (("partial", partial), ("dense", dense))
        ]
        assert self.drawn(runs, suffix=False) == [([5.0], [5.5]), ([3.0], [3.5])]
        assert self.drawn(runs, suffix=True) == [([4.0], [4.5]), ([2.9], [3.4])]
        plain = Run("plain", [step(1, 3.0)], [validation(1, 3.5)])
        figure = loss_figure(
            [plain, Run("partial", runs[0].training, [])], axes=["steps"], window=1, suffix=True
        )
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["partial"]
