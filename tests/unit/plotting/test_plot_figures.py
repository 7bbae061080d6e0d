"""The series behind the figures, that they are the ones that are drawn, and the command line."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_plot_records import step, validation, write

from megatron_smlp.errors import UsageError
from megatron_smlp.plotting.cli import main
from megatron_smlp.plotting.figures import load_figure, looks, loss_figure, router_figure
from megatron_smlp.plotting.records import Run, read_run
from megatron_smlp.plotting.series import (
    AXES,
    Curve,
    common_unit,
    curve,
    router_histories,
    smoothed,
)


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
    """Layer 2 has experts of 1/4 and 3/4, layer 4 of 1/2; validations at every second step."""
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
            ("steps", [1, 2, 3], ""),
            ("tokens", [2, 4, 6], " (thousands)"),
            ("flops", [3, 6, 9], "T"),
            ("time", [1, 2, 3], "minutes"),
        ],
    )
    def test_loss_against_each_axis(self, run: Run, name: str, x: list[float], label: str):
        unit, unit_name = common_unit([run], AXES[name])
        line = curve(run.training, axis=AXES[name], unit=unit, field="loss")
        assert (line.x.tolist(), line.y.tolist(), unit_name) == (x, [4, 3, 2], label)

    def test_losses_that_are_not_finite_are_left_out(self):
        records = [step(1, 2.0), {"iteration": 2, "loss": "nan"}, {"iteration": 3, "loss": "inf"}]
        line = curve(records, axis=AXES["steps"], unit=1, field="loss")
        assert line.x.tolist() == [1]

    def test_smoothing_averages_backwards(self):
        line = Curve(np.arange(4.0), np.array([4.0, 2.0, 0.0, 5.0]))
        assert smoothed(line, window=2).y.tolist() == [4, 3, 1, 2.5]
        assert smoothed(line, window=9).y.tolist() == pytest.approx([4, 3, 2, 2.75])
        assert smoothed(line, window=1) is line

    def test_routers(self, run: Run):
        second, fourth = router_histories(run)
        assert (second.layer, fourth.layer) == (2, 4)
        assert second.iterations.tolist() == [1, 2, 3]
        assert second.load.tolist() == [[0.5, 1.5]] * 3, "multiples of an even share"
        assert fourth.load.tolist() == [[1, 1]] * 3
        assert second.entropy.tolist() == [0.7] * 3
        assert second.drop_rate.tolist() == [0.2] * 3
        (evaluated,) = router_histories(run, evaluation=True)
        assert evaluated.iterations.tolist() == [2]
        assert evaluated.load.tolist() == [[2, 0]]


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

    def test_a_long_curve_is_smoothed_with_the_raw_one_thin_behind_it(self, tmp_path: Path):
        lines = [step(n, 2.0 + n % 2) for n in range(1, 101)]
        run = read_run(write(tmp_path / "long", *lines), label="long")
        raw, line = loss_figure([run], axes=["steps"], window=None).axes[0].get_lines()[:2]
        assert raw.get_ydata().tolist()[:4] == [3, 2, 3, 2]
        assert line.get_ydata().tolist()[:4] == [3, 2.5, 2.5, 2.5]
        assert raw.get_linewidth() < line.get_linewidth() / 2
        plain = loss_figure([run], axes=["steps"], window=1).axes[0].get_lines()
        assert plain[0].get_ydata().tolist() == raw.get_ydata().tolist()
        assert len(plain) == 2, "the curve, and no dots of a validation"

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
        paths = [write(tmp_path / name, *routed_lines()).parent for name in ("one", "two (b)")]
        output = tmp_path / "new" / "plots"
        main([*map(str, paths), "--output", str(output), "--smooth", "2"])
        names = ["loss", "routers"]
        names += [f"load-{run}{end}" for run in ("one", "two_b_") for end in ("", "-validation")]
        starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
        written = [f"{output}/{name}.{kind}" for name in names for kind in starts]
        assert capsys.readouterr().out.splitlines() == written
        for path in map(Path, written):
            assert path.read_bytes().startswith(starts[path.suffix[1:]])

    @pytest.mark.parametrize(
        ("words", "named"),
        [("--smooth 0", "--smooth 0"), ("--output {path}", "--output"), ("--against time", "time")],
    )
    def test_what_is_refused(self, tmp_path: Path, words: str, named: str):
        """A window of nothing, a file as the folder, and a field that no line has."""
        path = write(tmp_path, step(1), step(2))
        with pytest.raises(UsageError, match=named):
            main([str(tmp_path), *words.format(path=path).split()])


class TestParts:
    """A loss over all targets and one over a suffix never share an axis."""

    def drawn(self, runs: list[Run], *, suffix: bool) -> list[tuple[list[float], list[float]]]:
        """Of each run the y of its line and of its dots, where they are drawn."""
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

    def test_the_suffix_has_a_file_of_its_own(self, tmp_path: Path):
        for name, more in (("plain", {}), ("suffix", {"suffix_loss": 2.0})):
            write(tmp_path / name, step(1, 3.0, **progress(1), **more))
            words = ["--output", str(tmp_path / f"{name}-plots"), "--formats", "png"]
            main([str(tmp_path / name), *words])
        names = [
            sorted(f.name for f in (tmp_path / f"{n}-plots").iterdir()) for n in ("plain", "suffix")
        ]
        assert names == [["loss.png"], ["loss-suffix.png", "loss.png"]]


def test_no_two_of_many_runs_look_alike():
    first = [str(look) for look in itertools.islice(looks(), 27)]
    assert len(set(first)) == 27
