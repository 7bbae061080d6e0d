"""Plans: pieces of trunks, hashes, the tuning, and what is left to do."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.studies import SMALL, pretend, state_of, write_study

from megatron_smlp import plugin_texts
from megatron_smlp.errors import UsageError
from megatron_smlp.plugin_texts import PluginFile
from megatron_smlp.study.plan import PlannedRun, identity_of, next_factor
from megatron_smlp.study.state import BEGUN, DONE, FAILED, State, check_unchanged, read_json

TUNING = {"seed": 1, "horizon": "50K", "lr": [0.5, 1, 2], "extend-at-edge": 1}


def one_seed(tmp_path: Path) -> list[PlannedRun]:
    plan = state_of(write_study(tmp_path), runs=tmp_path).plan()
    return [run for run in plan.runs if run.system == "switch" and run.seed == 12]


def test_one_trunk_and_a_branch_a_horizon(tmp_path: Path):
    first, short, second, middle, longest = one_seed(tmp_path)
    assert (first.parent, short.parent, second.parent) == (None, first, first)
    assert (middle.parent, longest.parent) == (second, second)
    horizons = [run.horizon for run in (first, short, middle, longest)]
    assert horizons == [None, 100_000, 200_000, 400_000]
    assert short.start == first.end == short.end - round(short.end * 0.2)
    for run in (short, middle, longest):
        assert run.end == pytest.approx(run.horizon / 2048, rel=0.03)


def test_a_plugin_without_flags_or_parts_makes_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Such as a schedule; one with a mixer is known by the flags that choose it."""
    run, *_ = one_seed(tmp_path)
    named = {**run.flags, "plugin": ["mine.py"]}
    for parts, is_same in ((frozenset({"a mixer"}), True), (frozenset[str](), False)):
        plugin = PluginFile("mine", Path("mine.py"), "", parts)
        monkeypatch.setitem(plugin_texts.LOADED, "mine", plugin)
        assert (dataclasses.replace(run, flags=named).key == run.key) == is_same


def test_all_pieces_share_data_order_and_warmup(tmp_path: Path):
    runs = one_seed(tmp_path)
    for flag in ("train_iters", "seed", "lr_warmup_iters", "lr", "global_batch_size"):
        assert len({run.flags[flag] for run in runs}) == 1, flag
    for run in runs:
        decay_begins = run.flags["lr_decay_iters"] - run.flags["lr_wsd_decay_iters"]
        assert decay_begins >= run.end if run.horizon is None else decay_begins < run.end
        assert run.flags.get("exit_interval", run.flags["train_iters"]) == run.end


@pytest.mark.parametrize(
    ("fixed", "iterations"),
    [({}, 2), ({"lr-warmup-iters": 7}, 7), ({"lr-warmup-fraction": 0.1}, 5)],
)
def test_the_warm_up_of_the_study_replaces_that_of_the_files(
    tmp_path: Path, fixed: dict[str, Any], iterations: int
):
    path = write_study(tmp_path, fixed=SMALL["fixed"] | fixed)
    for run in state_of(path, runs=tmp_path).plan().runs:
        warm_up = {name: value for name, value in run.flags.items() if "warmup" in name}
        assert warm_up == {"lr_warmup_iters": iterations}


def test_the_hash_is_of_flags_data_and_parents(tmp_path: Path):
    first, short, *_ = one_seed(tmp_path)
    assert short.key == dataclasses.replace(short).key
    assert short.key != dataclasses.replace(short, flags={**short.flags, "lr": 1.0}).key
    assert short.key != dataclasses.replace(short, identity=identity_of({"train": "other"})).key
    other = dataclasses.replace(first, flags={**first.flags, "seed": 9})
    assert short.key != dataclasses.replace(short, parent=other).key


def tuned(tmp_path: Path, best: dict[str, float]):
    """Plan a study whose trials are over; the loss grows with the distance from the best factor."""
    known = state_of(write_study(tmp_path, tuning=TUNING), runs=tmp_path)
    pretend(known, lambda run: 5.0 + abs(run.factor - best[run.system]))
    return known.plan()


def test_the_best_trial_is_chosen(tmp_path: Path):
    plan = tuned(tmp_path, {"transformer": 1, "switch": 1, "smlp_deterministic": 1})
    assert plan.factors == dict.fromkeys(plan.factors, 1.0)
    assert sum(run.phase == "tuning" for run in plan.runs) == 9


def test_a_best_rate_at_the_edge_is_told_once_no_trial_is_left(tmp_path: Path):
    best = {"transformer": 1, "switch": 16, "smlp_deterministic": 0.25}
    assert tuned(tmp_path, best).at_edge == ["switch", "smlp_deterministic"]


@pytest.mark.parametrize(
    ("losses", "factor"), [([3, 4, 5], 0.5), ([5, 4, 3], 8.0), ([4, 3, 5], 1.41), ([5, 3, 4], 2.83)]
)
def test_where_one_more_trial_goes(losses: list[float], factor: float):
    assert next_factor([1, 2, 4], losses) == factor


def fail(known: State, run: PlannedRun) -> None:
    known.folder_of(run).mkdir(parents=True)
    known.end(run, status=FAILED, last_lines=["no memory"])


class TestWhatIsLeft:
    def test_a_run_that_is_in_the_results_is_done(self, tmp_path: Path):
        known = state_of(write_study(tmp_path), runs=tmp_path)
        kept = {run.key: {"status": DONE, "loss": 4.0} for run in known.plan().runs}
        again = dataclasses.replace(known, kept=kept)
        assert again.to_do(again.plan()) == []
        assert len(known.to_do(known.plan())) == 45

    def test_a_parent_is_made_again_where_its_checkpoint_is_not_here(self, tmp_path: Path):
        known = state_of(write_study(tmp_path), runs=tmp_path)
        runs = list(known.plan().runs)
        kept = {run.key: {"status": DONE, "loss": 4.0} for run in runs[:-1]}
        again = dataclasses.replace(known, kept=kept)
        last = runs[-1]
        assert again.to_do(again.plan()) == [last.parent.parent, last.parent, last]

    def test_a_diverged_trial_is_never_chosen(self, tmp_path: Path):
        known = state_of(
            write_study(tmp_path, tuning=TUNING | {"extend-at-edge": 1}), runs=tmp_path
        )
        pretend(known, lambda run: float("inf") if run.factor >= 2 else 5 - run.factor)
        assert set(known.plan().factors.values()) <= {1.0, 1.41}

    def test_the_others_get_as_many_trials_where_one_system_waits(self, tmp_path: Path):
        known = state_of(write_study(tmp_path, tuning=TUNING), runs=tmp_path)
        first = known.plan().runs[0]
        fail(known, first)
        best = {"switch": 4.0}

        def losses(run: PlannedRun) -> float:
            return 5.0 + abs(run.factor - best.get(run.system, 1.0))

        pretend(known, losses)
        plan = known.plan()
        trials = [run.system for run in plan.runs if run.phase == "tuning"]
        counts = {name: trials.count(name) for name in known.systems}
        assert counts == {"transformer": 3, "switch": 4, "smlp_deterministic": 4}
        assert plan.factors["switch"] == 4.0
        (known.folder_of(first) / "ended.json").unlink()  # it is retried, and succeeds
        pretend(known, losses)
        trials = [run.system for run in known.plan().runs if run.phase == "tuning"]
        assert {trials.count(name) for name in known.systems} == {4}
        assert known.plan().pending == ()
        assert known.failure(known.plan()) == ""

    @pytest.mark.parametrize(("extend", "chosen"), [(None, ["transformer"]), (1, [])])
    def test_no_system_waits_for_the_trials_of_another_where_their_number_is_known(
        self, tmp_path: Path, extend: int | None, chosen: list[str]
    ):
        tuning = {name: value for name, value in TUNING.items() if name != "extend-at-edge"}
        tuning |= {"extend-at-edge": extend} if extend else {}
        known = state_of(write_study(tmp_path, tuning=tuning), runs=tmp_path)
        for run in known.plan().runs:
            if run.system == "transformer":
                known.folder_of(run).mkdir(parents=True)
                known.end(run, status=DONE, loss=str(5.0 + abs(run.factor - 1)))
        plan = known.plan()
        assert [*plan.factors] == chosen
        assert {run.system for run in plan.runs if run.phase == "main"} == {*chosen}

    def test_what_goes_on_from_a_failed_trunk_waits(self, tmp_path: Path):
        known = state_of(write_study(tmp_path), runs=tmp_path)
        trunk = known.plan().runs[0]
        fail(known, trunk)
        assert known.failure(known.plan()) == f"failed: {trunk.title}; blocked runs: 4"


def begun_as(known: State, other: State) -> None:
    if before := read_json(known.folder / BEGUN):
        check_unchanged(before, other.description(), where=known.folder)
    other.record(known.folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": [11, 12, 14]}, r"study\.seeds\.switch: \[11, 12, 13\] -> \[11, 12, 14\]"),
        ({"seeds": [14, 11, 12, 13]}, r"study\.seeds\.switch"),
        ({"subject": "switch"}, "study.subject"),
        ({"systems": ["transformer", "smlp_deterministic"]}, "study.systems"),
    ],
)
def test_a_study_that_changed_is_refused_with_the_difference(
    tmp_path: Path, changes: dict[str, Any], named: str
):
    known = state_of(write_study(tmp_path), runs=tmp_path)
    begun_as(known, known)
    begun_as(known, known)
    other = state_of(write_study(tmp_path, **changes), runs=tmp_path)
    with pytest.raises(UsageError, match=named):
        begun_as(known, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": {"switch": [11, 12, 13, 14], "others": [11, 12, 13]}},
        {"flops-tolerance": 0.05, "needed-flops-tolerance": 0.05},
        {"cluster": {"gpus": 8, "tflops": 989, "utilization": 0.4}},
        {"speed": {"rounds": 7}},
        {"titles": {"switch": "Transformer, Switch"}},
        {"systems": [*SMALL["systems"], "hash"]},
    ],
)
def test_what_no_run_depends_on_may_change(tmp_path: Path, changes: dict[str, Any]):
    known = state_of(write_study(tmp_path), runs=tmp_path)
    begun_as(known, known)
    other = state_of(write_study(tmp_path, **changes), runs=tmp_path)
    begun_as(known, other)
    keys = {run.key for run in known.plan().runs}
    assert keys <= {run.key for run in other.plan().runs}
    if "seeds" in changes:  # and seeds that were added cannot be removed again
        with pytest.raises(UsageError, match=r"study\.seeds\.switch: \[11, 12, 13, 14\] -> "):
            begun_as(known, known)
