"""Router reports, printed and written, in whole runs of a model with both kinds of router."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.in_process import pretrained
from support.launches import records

from megatron_smlp.routers.collapse import CollapseWatch
from megatron_smlp.routers.statistics import RouterKey, RouterLoad
from megatron_smlp.training.data import needs_every_batch
from megatron_smlp.training.router_report import router_records

PARTIAL = """
    --architecture smlp --num-dense-layers 2 --num-feature-experts 4 --feature-router partial
    --token-router base --num-experts 4 --moe-token-dispatcher-type alltoall
"""


def load(*shares: float, drop_rate: float = 0.0, choices: int = 100, **more: Any) -> RouterLoad:
    values = {"mean_gate": 0.5, "closed_rate": None, "aux_loss": None, "z_loss": None} | more
    return RouterLoad(shares, drop_rate=drop_rate, choices=choices, **values)


FIRST, SECOND, CHUNKS = RouterKey(2, "token"), RouterKey(4, "token"), RouterKey(4, "feature")


def test_records_have_the_numbers_that_the_router_has():
    (record,) = router_records({CHUNKS: load(0.75, 0.25, aux_loss=1.25)})
    assert record == {
        "layer": 4, "kind": "feature", "load_share": [0.75, 0.25], "load_share_min": 0.25,
        "load_share_max": 0.75, "entropy": 0.811278, "drop_rate": 0.0, "mean_gate": 0.5,
        "aux_loss": 1.25, "choices": 100,
    }  # fmt: skip


class TestCollapse:
    def test_it_is_said_once_of_each_router(self):
        watch = CollapseWatch()
        even, gone = load(0.5, 0.5), load(0.9, 0.1)
        assert list(watch.warnings({FIRST: gone}, iteration=10)) == []
        assert list(watch.warnings({FIRST: even}, iteration=20)) == []
        (line,) = watch.warnings({FIRST: gone, SECOND: even}, iteration=20)
        assert line.startswith(
            "warning: iteration 20: the token router of layer 2 collapses: entropy 0.47 of log E "
            "is under 0.8, expert 0 gets 90% of the choices"
        )
        (line,) = watch.warnings({FIRST: gone, SECOND: gone}, iteration=30, title="validation")
        assert line.startswith("warning: iteration 30 validation: the token router of layer 4")
        assert list(watch.warnings({FIRST: gone, SECOND: gone}, iteration=40)) == []

    def test_closed_experts_are_said_of_an_even_load(self):
        watch = CollapseWatch()
        half, most = (load(0.5, 0.5, closed_rate=rate) for rate in (0.5, 0.75))
        assert list(watch.warnings({FIRST: half}, iteration=10)) == []
        (line,) = watch.warnings({FIRST: most}, iteration=20)
        assert line.startswith(
            "warning: iteration 20: the token router of layer 2 collapses: 75% of the choices are "
            "weighted below 0.01, so their experts neither do nor learn anything"
        )
        assert list(watch.warnings({FIRST: most}, iteration=30)) == []
        greedy = load(0.9, 0.1, 0.0, 0.0, closed_rate=0.0)
        assert len(list(watch.warnings({FIRST: greedy}, iteration=30, title="validation"))) == 1

    def test_it_is_not_said_of_hash(self):
        watch = CollapseWatch(fixed=("token",))
        lines = list(watch.warnings({FIRST: load(1, 0), CHUNKS: load(1, 0)}, iteration=20))
        assert len(lines) == 1
        assert "the feature router" in lines[0]


class TestRun:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Train four steps, with a line and a validation every two."""
        folder = tmp_path_factory.mktemp("routers")
        flags = f"{PARTIAL} --log-dir {folder} --log-interval 2 --eval-interval 2"
        flags += " --moe-z-loss-coeff 1e-3"
        with pretrained(f"{flags} --tensorboard-dir {folder}/events"):
            return folder

    def test_a_line_covers_the_steps_since_the_last_one(self, folder: Path):
        """2 samples of 16 tokens a step; a feature router has 4 chunks a sample."""
        for record in records(folder):
            if "loss" in record:
                assert [(r["layer"], r["kind"], r["choices"]) for r in record["routers"]] == [
                    (3, "feature", 16), (3, "token", 64), (4, "feature", 16), (4, "token", 64)
                ]  # fmt: skip
                assert all(sum(r["load_share"]) == pytest.approx(1) for r in record["routers"])

    def test_evaluations_have_lines_of_their_own_once(self, folder: Path):
        lines = records(folder)
        names = ["loss", "validation_loss", "test_loss"]
        found = [(line["iteration"], next(n for n in names if n in line)) for line in lines]
        expected = [(2, "loss"), (2, "validation_loss"), (4, "loss"), (4, "validation_loss")]
        assert found == [*expected, (4, "test_loss")]
        assert {r["choices"] for r in lines[1]["validation_routers"]} == {8, 32}

    def test_the_suffix_has_a_perplexity_beside_that_of_the_whole(self, folder: Path):
        validation = records(folder)[1]
        whole, suffix = validation["validation_loss"], validation["validation_suffix_loss"]
        assert whole != suffix
        assert validation["validation_suffix_perplexity"] == pytest.approx(math.exp(suffix))
        assert not any(" " in name for name in validation), validation.keys()

    def test_a_run_can_be_drawn_against_all_that_it_logs(self, folder: Path):
        lines = records(folder)
        for name in ("consumed_tokens", "consumed_flops", "wall_seconds"):
            values = [line[name] for line in lines]
            assert values == sorted(values)
            assert values[0] > 0
        assert lines[0]["consumed_tokens"] == 2 * 2 * 16
        assert lines[2]["consumed_flops"] == pytest.approx(2 * lines[0]["consumed_flops"])

    def test_tensorboard_has_every_number(self, folder: Path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "events")).Reload()
        lines = records(folder)
        for prefix, key, steps in (
            ("", "routers", [lines[0], lines[2]]),
            ("validation ", "validation_routers", [lines[1], lines[3]]),
            ("test ", "test_routers", [lines[4]]),
        ):
            for place, router in enumerate(steps[0][key]):
                for name in set(router) - {"layer", "kind", "choices", "load_share"}:
                    tag = f"{prefix}router/layer {router['layer']} {router['kind']}/{name}"
                    scalars = [(event.step, event.value) for event in events.Scalars(tag)]
                    expected = [(line["iteration"], line[key][place][name]) for line in steps]
                    for found, wanted in zip(scalars, expected, strict=True):
                        assert found == pytest.approx(wanted, abs=1e-6)

    def test_megatrons_curve_is_a_mean_over_the_layers_that_have_experts(self, folder: Path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "events")).Reload()
        curve = [event.value for event in events.Scalars("z_loss")]
        for line, steps in zip(records(folder)[:3:2], (curve[:2], curve[2:]), strict=True):
            losses = [router["z_loss"] for router in line["routers"] if router["kind"] == "token"]
            assert len(losses) == 2
            assert sum(steps) / 2 == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_console_line_and_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Every token prefers one centroid: greedy evaluation sends all tokens to one expert."""
    flags = f"{PARTIAL} --log-dir {tmp_path} --train-iters 20 --log-interval 20"
    with pretrained(flags):
        shown = capfd.readouterr().out.splitlines()
    step = next(line for line in shown if line.startswith("iteration 20/20"))
    assert "| experts 1.0-1.0x, entropy 1.00, dropped 0.0% | chunks " in step
    validated = [line for line in shown if line.startswith("iteration 20 validation")]
    assert len(validated) == 1
    assert " | suffix ppl " in validated[0]
    warned = [line for line in shown if line.startswith("warning: iteration 20")]
    collapsed = {
        (r["layer"], r["kind"])
        for line in records(tmp_path)
        for key in ("routers", "validation_routers", "test_routers")
        for r in line.get(key, [])
        if r["entropy"] < 0.8
    }
    assert len(warned) == len(collapsed) > 0
    assert all(any(f"{k} router of layer {n}" in w for w in warned) for n, k in collapsed)


@pytest.mark.parametrize(
    ("flags", "everywhere"),
    [
        (PARTIAL, False),
        ("--num-attention-heads 4 --token-router hash --num-experts 4", True),
    ],
)
def test_every_stage_reads_what_its_routers_look_at(
    parse: Callable[..., Any], flags: str, everywhere: bool
):
    """HASH needs token ids."""
    assert needs_every_batch(parse(flags)) == everywhere


def test_wall_time_goes_on_over_a_restart(tmp_path: Path):
    """From the checkpoint's last line, not from zero, nor from steps lost after the checkpoint."""
    flags = f"--architecture gmlp --log-interval 1 --save {tmp_path} --lr-decay-iters 4"
    with pretrained(f"{flags} --train-iters 2 --save-interval 2"):
        before = records(tmp_path)
    last = before[-1] | {"wall_seconds": before[-1]["wall_seconds"] + 1000}
    lost = {"iteration": 3, "loss": 1.0, "wall_seconds": 5000.0}
    text = "".join(json.dumps(line) + "\n" for line in [*before[:-1], last, lost])
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pretrained(f"{flags} --train-iters 4 --override-opt_param-scheduler"):
        after = [line for line in records(tmp_path) if "loss" in line]
    assert [line["iteration"] for line in after] == [1, 2, 3, 4]
    walls = [line["wall_seconds"] for line in after[2:]]
    assert last["wall_seconds"] < walls[0] < walls[1] < last["wall_seconds"] + 500
