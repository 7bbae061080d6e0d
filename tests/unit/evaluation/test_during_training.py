"""--eval-tasks: tasks are scored between training steps without affecting the training."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import EXAMPLES, SYSTEMS, WRITING, loaded, write_task
from support.checkpoints import checkpoint_tensors
from support.in_process import base_for, pretrained
from support.launches import launch, records

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation import during_training
from megatron_smlp.evaluation.selection import select_tasks
from megatron_smlp.training.agreement import StepAgreement
from megatron_smlp.training.speed import StepClock


def training(system: str, tokenizer: Path, folder: Path) -> str:
    return (
        f"{SYSTEMS[system]} --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer} "
        f"--save {folder} --tensorboard-dir {folder}/events --lr 3e-2 --init-method-std 0.2 "
        "--hidden-dropout 0.1 --log-interval 1 --eval-interval 2"
    )


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    times = ("second", "tflops", "share", "mfu", "slow_hosts")
    return {name: value for name, value in line.items() if not any(t in name for t in times)}


def test_the_training_does_not_notice(
    tasks: Path,
    tokenizer: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Losses, router counts and weights stay bitwise the same, with dropout and GShard's draws; the
    last scores are those that tools/evaluate.py gives for the saved checkpoint. A step's time
    excludes what is done between steps.
    """
    with pretrained(training("gshard", tokenizer, tmp_path / "plain")):
        pass
    flags = f"--eval-tasks copa,piqa --eval-tasks-interval 3 --eval-tasks-data-dir {tasks}"
    excluded: list[float] = []
    monkeypatch.setattr(StepClock, "exclude", lambda _, seconds: excluded.append(seconds))
    with pretrained(f"{training('gshard', tokenizer, tmp_path / 'scored')} {flags}"):
        shown = capfd.readouterr().out
    lines = records(tmp_path / "scored")
    scored = [line for line in lines if "tasks" in line]
    others = [without_time(line) for line in lines if "tasks" not in line]
    assert others == [without_time(line) for line in records(tmp_path / "plain")]
    ours, theirs = (checkpoint_tensors(tmp_path / name, 4) for name in ("scored", "plain"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert [line["iteration"] for line in scored] == [3, 4]
    told = [line["seconds"] for line in lines if "seconds" in line]
    assert len(told) == 5, "tasks and validation twice each, and the test data"
    # Both logs have a clock; no step follows the test.
    assert len(excluded) == 2 * 5, "tasks and validation twice each, and a save"
    *between, _test = told
    assert sum(excluded) / 2 > sum(between)
    assert "iteration 4 tasks | copa acc 0." in shown
    assert scored[-1]["tasks"] == _afterwards(tmp_path / "scored", tasks)
    assert scored[-1]["tasks"]["copa"]["examples"] == EXAMPLES
    _check_tensorboard(tmp_path / "scored" / "events", scored)


def test_an_ending_run_saves_before_it_scores(
    tasks: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The notice of a signal may be shorter than the tasks."""
    tracker, found = tmp_path / "latest_checkpointed_iteration.txt", []
    score = during_training.TaskEvaluation.scores

    def scores(self: Any) -> Any:
        found.append(tracker.read_text())
        return score(self)

    monkeypatch.setattr(during_training.TaskEvaluation, "scores", scores)
    monkeypatch.setattr(StepAgreement, "_is_late", lambda it: it.args.curr_iteration == 1)
    flags = f"--eval-tasks copa --eval-tasks-interval 2 --eval-tasks-data-dir {tasks}"
    with pretrained(f"{training('gshard', tokenizer, tmp_path)} {flags}"):
        pass
    assert found == ["2"]


LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2",
    "dp2": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_score_what_one_does(
    tasks: Path, tokenizer: Path, tmp_path: Path, layout: str
):
    """The training is unaffected, and the scores are the checkpoint's."""
    base = f"{base_for('--tokenizer-type')} --micro-batch-size 1 --train-iters 3"
    scores = f"--eval-tasks copa,piqa --eval-tasks-interval 2 --eval-tasks-data-dir {tasks}"
    runs = {}
    for kind, more in {"plain": "", "scored": scores}.items():
        flags = training("partial", tokenizer, tmp_path / f"{kind}-run")
        runs[kind] = f"{base} {flags} {LAYOUTS[layout]} {more}"
    probe = "1" if layout == "dp2" else ""  # are parameters gathered where they are read?
    launch(runs, processes=2, folder=tmp_path, GATHER_PROBE=probe)
    lines = records(tmp_path / "scored")
    scored = [line for line in lines if "tasks" in line]
    others = [without_time(line) for line in lines if "tasks" not in line]
    assert others == [without_time(line) for line in records(tmp_path / "plain")]
    assert [line["iteration"] for line in scored] == [2, 3]
    assert scored[-1]["tasks"] == _afterwards(tmp_path / "scored-run", tasks)
    _check_tensorboard(tmp_path / "scored-run" / "events", scored)


def _afterwards(checkpoint: Path, tasks: Path) -> dict[str, Any]:
    from megatron_smlp.evaluation.harness import ScorerModel, run_tasks
    from megatron_smlp.evaluation.megatron_scorer import MegatronScorer
    from megatron_smlp.evaluation.reports import as_record
    from megatron_smlp.library_logging import quiet_libraries

    with quiet_libraries(), loaded(checkpoint) as (args, stages, tokenizer):
        scorer = MegatronScorer(stages, longest=args.seq_length, batch_size=2)
        selection = select_tasks(["copa", "piqa"], data_dir=str(tasks))
        model = ScorerModel(scorer, tokenizer)
        return as_record(run_tasks(model, selection, limit=None))


def _check_tensorboard(folder: Path, scored: list[dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("tasks/piqa/acc_norm")]
    assert found == [
        (line["iteration"], pytest.approx(line["tasks"]["piqa"]["acc_norm"])) for line in scored
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--eval-tasks-interval 2", "--eval-tasks-interval 2 needs --eval-tasks"),
        ("--eval-tasks copq --eval-tasks-data-dir {tasks}", "did you mean copa"),
        ("--eval-tasks record --eval-tasks-data-dir {tasks}", "has no record"),
        ("--eval-tasks copa --eval-tasks-data-dir {tasks}", "needs a text tokenizer"),
    ],
)
def test_wrong_flags_are_said_before_the_training(flags: str, said: str, tasks: Path):
    """The tokenizer of `pretrained` has no text."""
    argv = f"--architecture gmlp {flags.format(tasks=tasks)}"
    with pytest.raises(UsageError, match=said), pretrained(argv):
        pass


def test_a_task_that_cannot_be_scored_is_said_before_the_training(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_task(tmp_path, "writing", [("the model", [" mixes"])], WRITING)
    select = partial(select_tasks, include_path=str(tmp_path))
    monkeypatch.setattr(during_training, "select_tasks", select)
    # With a folder for data, the harness does not read the thousands of its own tasks.
    flags = f"--eval-tasks writing --eval-tasks-data-dir {tmp_path}"
    flags += f" {training('partial', tokenizer, tmp_path / 'run')}"
    with pytest.raises(UsageError, match="generate text"), pretrained(flags):
        pass
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
