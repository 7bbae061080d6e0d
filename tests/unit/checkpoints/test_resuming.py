"""`--use-checkpoint-args` takes a checkpoint's flags: which may change and which may not."""

import json
import random
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from support import checkpoints
from support.checkpoints import assert_ends_like, carry_on, flip_a_bit, pretrain
from support.in_process import MINIMAL, prepare_megatron, pretrained
from support.launches import records, steps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_smlp.checkpoints import optimizer_state, state
from megatron_smlp.checkpoints.folders import RUN, iteration_folder, iterations, tracked_iteration
from megatron_smlp.checkpoints.run_record import read_run_record
from megatron_smlp.errors import UsageError
from megatron_smlp.training.data import _training_samples

Capture = pytest.CaptureFixture[str]


def test_a_run_goes_on_without_its_flags(finished_run: Path, tmp_path: Path, capfd: Capture):
    run = tmp_path / "run"
    pretrain(f"--save {run} --exit-interval 2")
    carry_on(f"--load {run} --use-checkpoint-args")
    output = capfd.readouterr().out
    assert "resumed from iteration 2 of" in output
    assert "changed since" not in output
    assert_ends_like(run, finished_run)


def test_a_yaml_file_and_a_moved_folder(finished_run: Path, tmp_path: Path):
    """The file is not read again, and a resumed run's own record is complete again."""
    config = tmp_path / "config.yaml"
    config.write_text("clip_grad: 0.5\nuntie_embeddings_and_output_weights: true\n", "utf-8")
    pretrain(f"--save {tmp_path / 'run'} --config {config} --exit-interval 2")
    config.unlink()
    run = (tmp_path / "run").rename(tmp_path / "moved")
    carry_on(f"--load {run} --use-checkpoint-args --exit-interval 4")
    carry_on(f"--load {run} --use-checkpoint-args")
    assert iterations(run) == [2, 4, 6]
    assert not (tmp_path / "run").exists()
    record = read_run_record(iteration_folder(run, 6)) or {}
    assert record["iteration"] == 6
    assert record["consumed_train_samples"] == 12
    assert record["flags"]["clip_grad"] == 0.5
    assert "--untie-embeddings-and-output-weights" in record["command_line"]


def test_learning_rate_and_batch_may_change_and_are_told(run: Path, capfd: Capture):
    carry_on(
        f"--load {run} --ckpt-step 2 --use-checkpoint-args --lr 5e-4 --global-batch-size 4 "
        "--train-iters 8"
    )
    output = capfd.readouterr().out
    changed = "--global-batch-size 2 -> 4, --lr 0.001 -> 0.0005, --train-iters 6 -> 8"
    assert f"changed since iteration 2: {changed}" in output
    assert iterations(run)[-1] == 8
    lines = [line for line in records(run) if "learning_rate" in line]
    rates = {line["iteration"]: line["learning_rate"] for line in lines}
    assert rates[8] < rates[3] <= 5e-4 < rates[2]


def test_less_may_be_read_from_a_checkpoint_on(tmp_path: Path):
    """Megatron resumes after the samples that were read so far, however few are left."""
    flags = f"--save {tmp_path / 'run'}"
    pretrain(f"{flags} --exit-interval 4 --eval-interval 1 --eval-iters 4 --global-batch-size 8")
    pretrain(f"{flags} --eval-interval 2 --eval-iters 1 --global-batch-size 2")
    assert tracked_iteration(tmp_path / "run") == 6


def test_another_batch_trains_the_rest_of_the_samples(tmp_path: Path):
    base = MINIMAL.replace("--train-iters 4", "--train-samples 24")
    argv = f"{checkpoints.RUN.replace('--train-iters 6', '')} --save {tmp_path}"
    for flags in ("--global-batch-size 4 --exit-interval 2", "--global-batch-size 2"):
        with pretrained(f"{argv} {flags}", base=base):
            pass
    line = [line for line in records(tmp_path) if "loss" in line][-1]
    assert (line["iteration"], line["consumed_samples"]) == (10, 24)


def test_a_resumed_run_profiles_the_steps_that_are_named(run: Path, tmp_path: Path):
    steps = "--profile-step-start 5 --profile-step-end 6"
    events = f"--tensorboard-dir {tmp_path / 'events'}"
    pretrain(f"--save {run} --ckpt-step 4 --profile --use-pytorch-profiler {steps} {events}")
    assert list((tmp_path / "torch_profile").iterdir())


@pytest.mark.parametrize(
    "flags", ["--no-save-optim --no-save-rng", "--no-save-optim --use-distributed-optimizer"]
)
def test_what_is_saved_no_more_is_still_read(run: Path, finished_run: Path, flags: str):
    pretrain(f"--save {run} --ckpt-step 4 {flags}")
    assert steps(run) == steps(finished_run)


def test_what_was_not_saved_is_told(tmp_path: Path, capfd: Capture):
    """A schedule that warms up again would otherwise show in the curve of the rate only."""
    flags = f"--save {tmp_path} --no-save-optim"
    pretrain(f"{flags} --exit-interval 4")
    capfd.readouterr()
    pretrain(f"{flags} --exit-interval 5")
    told = "WARNING: iteration 4 was saved with --no-save-optim: optimizer and learning rate"
    assert told in capfd.readouterr().out
    rates = {line["iteration"]: line["learning_rate"] for line in records(tmp_path)}
    assert rates[5] == rates[1]
    pretrain(f"{flags} --ckpt-step 4 --no-load-optim --exit-interval 5")
    assert told not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("saved", "changed", "named"),
    [
        ("", "--bf16", "--bf16"),
        ("--use-distributed-optimizer --optimizer-checkpoint data_parallel",
         "--overlap-grad-reduce --ddp-bucket-size 500", "--overlap-grad-reduce, --ddp-bucket-size"),
    ],
)  # fmt: skip
def test_optimizer_state_of_another_form(tmp_path: Path, saved: str, changed: str, named: str):
    flags = f"--save {tmp_path} {saved}"
    pretrain(f"{flags} --exit-interval 2")
    message = rf"optimizer state in .*iter_0000002 does not fit .* {named}: .*--no-load-optim"
    with pytest.raises(UsageError, match=message):
        pretrain(f"{flags} {changed}")
    pretrain(f"{flags} {changed} --no-load-optim --exit-interval 4")
    assert tracked_iteration(tmp_path) == 4


def test_optimizer_state_by_rank_takes_the_runs_own_rates(tmp_path: Path):
    """Like state for any layout: rates and betas come from flags, moments from the checkpoint."""
    runs = [tmp_path / kind for kind in ("any_layout", "data_parallel")]
    for run in runs:
        flags = f"--save {run} --use-distributed-optimizer --optimizer-checkpoint {run.name}"
        pretrain(f"{flags} --exit-interval 2")
        pretrain(f"{flags} --lr 5e-4 --adam-beta2 0.9")
    assert len(steps(runs[1])) == 6
    assert steps(runs[1]) == steps(runs[0])


def test_moments_are_there_before_a_first_update():
    """Some optimizers, such as Transformer Engine's, create them in their first step."""
    prepare_megatron()
    weight = torch.ones(3)

    def init(optimizer: torch.optim.Optimizer, config: object) -> None:
        optimizer.state[weight]["exp_avg"] = torch.zeros(3)

    part = object.__new__(DistributedOptimizer)
    part.optimizer, part.init_state_fn, part.config = torch.optim.SGD([weight], lr=1), init, None
    optimizer_state._allocate_moments(SimpleNamespace(chained_optimizers=[part]))
    assert [*part.optimizer.state[weight]] == ["exp_avg"]


def test_random_states_of_another_device():
    """A GPU's state is 16 bytes, which mean nothing on a CPU."""
    prepare_megatron()
    tracker = tensor_parallel.get_cuda_rng_tracker()
    before = torch.get_rng_state(), tracker.get_states()
    of_gpu = torch.zeros(16, dtype=torch.uint8)
    state._set_rng({
        "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
        "torch_rng_state": before[0], "cuda_rng_state": of_gpu,
        "rng_tracker_states": {"model-parallel-rng": of_gpu},
    })  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before[0])
    assert tracker.get_states().keys() == before[1].keys()


def test_a_run_from_anothers_weights_goes_on(run: Path, tmp_path: Path, capfd: Capture):
    tuned = tmp_path / "tuned"
    flags = f"--load {run} --finetune --save {tuned}"
    pretrain(f"{flags} --exit-interval 4")
    capfd.readouterr()
    pretrain(flags)
    said = f"resumed from iteration 4 of {tuned} (started from --load {run})"
    assert said in " ".join(capfd.readouterr().out.split())
    assert iterations(tuned) == [2, 4, 6]


def test_a_finished_run_leaves_everything_as_it_is(run: Path, capfd: Capture):
    """Megatron would validate once more, on the next samples."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("megatron.log", ".lease-000001"):  # which record the start
        del before[run / name]
    with pretrained(f"{checkpoints.RUN} --save {run}"):
        pass
    assert "nothing is left to train: --train-iters 6 is reached" in capfd.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("lost", [1, 2])
def test_evaluations_that_a_killed_run_lacks_are_made_up(run: Path, lost: int):
    """The test's line is lost, or that of the last validation too."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines()
    metrics.write_text("\n".join(lines[:-lost]) + "\n", encoding="utf-8")
    pretrain(f"--save {run}")
    again = records(run)
    assert len(again) == len(lines)
    for line, before in zip(again[-2:], map(json.loads, lines[-2:]), strict=True):
        for name in ("iteration", "validation_loss", "test_loss"):
            assert line.get(name) == before.get(name)
    assert "test_loss" in again[-1]


def test_a_validation_before_the_last_save_is_made_up(tmp_path: Path):
    """Such as one that --exit-duration-in-mins cut off: its line is missing."""
    flags, metrics = f"--save {tmp_path} --eval-interval 2", tmp_path / "metrics.jsonl"
    pretrain(f"{flags} --exit-interval 2")
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if "validation_loss" not in line]
    assert len(kept) == len(lines) - 1
    metrics.write_text("".join(kept), encoding="utf-8")
    pretrain(f"{flags} --exit-interval 4")
    found = [line["iteration"] for line in records(tmp_path) if "validation_loss" in line]
    assert found == [2, 4]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path):
    """Also after a start from scratch in the same folders."""
    run, events = tmp_path / "run", tmp_path / "events"
    flags = f"--save {run} --tensorboard-dir {events} --tensorboard-log-interval 1"
    pretrain(f"{flags} --exit-interval 5")
    shutil.rmtree(iteration_folder(run, 5))
    for more, last in (("", 6), ("--no-resume --exit-interval 3", 3)):
        pretrain(f"{flags} {more}")
        scalars = EventAccumulator(str(events)).Reload().Scalars("run/consumed_tokens")
        found = [(event.step, event.value) for event in scalars]
        assert found == [(n, 32 * n) for n in range(1, last + 1)]


def test_damaged_flags_are_not_believed(run: Path, capfd: Capture):
    flip_a_bit(iteration_folder(run, 6) / RUN)
    carry_on(f"--load {run} --use-checkpoint-args")
    output = capfd.readouterr().out
    assert "run.json is not what was written" in output
    assert "resumed from iteration 4 of" in output


def test_what_has_no_flags_is_refused(run: Path, tmp_path: Path):
    for iteration in (2, 4, 6):
        (iteration_folder(run, iteration) / RUN).unlink()
    with pytest.raises(UsageError, match=r"iter_0000006 has no intact run\.json"):
        carry_on(f"--load {run} --use-checkpoint-args")
    with pytest.raises(UsageError, match="holds no checkpoint"):
        carry_on(f"--load {tmp_path / 'nothing'} --use-checkpoint-args")
    with pytest.raises(UsageError, match="name it with --load"):
        carry_on("--use-checkpoint-args")


class TestABranch:
    """`--branch-from`: decay a run that has a constant rate, in a folder of its own."""

    CONSTANT = "--train-iters 12 --lr 1e-2 --min-lr 1e-4 --lr-decay-style constant"
    BRANCH = "--branch-from 4 --lr-wsd-decay-iters 4"

    @pytest.fixture(scope="class")
    @classmethod
    def trunk(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Its rate is halved after six iterations."""
        run: Path = tmp_path_factory.mktemp("branch") / "trunk"
        pretrain(f"{cls.CONSTANT} --save {run} --exit-interval 6")
        pretrain(f"{cls.CONSTANT} --save {run} --lr 5e-3")
        return run

    def test_it_decays_and_ends(self, trunk: Path, tmp_path: Path, capfd: Capture):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        flags = f"{self.CONSTANT} {self.BRANCH} --load {trunk}"
        pretrain(f"{flags} --save {whole}")
        rates = [r["learning_rate"] for r in records(whole) if "loss" in r]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] == 1e-2
        assert rates[-1] < 2e-3
        # Its first step still has the run's rate, and all of its steps have the run's data.
        assert steps(whole)[:2] == steps(trunk)[4:6]
        assert len(steps(whole)) == 4
        assert iterations(whole) == [6, 8]
        pretrain(f"{flags} --save {parts} --exit-interval 6")
        pretrain(f"{flags} --save {parts}")
        carry_on(f"--load {parts} --use-checkpoint-args")
        assert_ends_like(parts, whole, iteration=8)
        assert "nothing is left to train" in capfd.readouterr().out
        # Its flags are those of where it begins, not of the trunk's end.
        carry_on(f"--load {trunk} --use-checkpoint-args {self.BRANCH} --save {tmp_path / 'short'}")
        assert_ends_like(tmp_path / "short", whole, iteration=8)
        assert iterations(trunk) == [2, 4, 6, 8, 10, 12]
        elsewhere = f"--load {whole} --use-checkpoint-args --save {tmp_path / 'elsewhere'}"
        carry_on(f"{elsewhere} --finetune --train-iters 2")
        assert iterations(tmp_path / "elsewhere") == [2]

    def test_its_samples_are_in_the_runs_order(self):
        """Over several epochs, Megatron's order depends on the number of epochs."""
        branch = Namespace(train_samples=None, train_iters=8, branch_from=4, global_batch_size=2)
        branch.explicit_flags = {"train_iters": 12}
        branch.iteration, branch.consumed_train_samples = 4, 8
        assert _training_samples(branch) == 24

    def test_a_run_whose_rate_decays_has_no_branch(self, run: Path, tmp_path: Path):
        flags = f"--load {run} --use-checkpoint-args --branch-from 4 --save {tmp_path / 'branch'}"
        with pytest.raises(UsageError, match=r"--branch-from 4: .* with --lr-decay-style linear"):
            carry_on(flags)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--branch-from 4 --load {0} --save {0}", "would write to the original"),
            ("--branch-from 5 --load {0}", "--branch-from 5: .* holds no checkpoint"),
            ("--branch-from 12 --load {0}", "--branch-from 12 with .* ends at iteration 15"),
            ("--branch-from 4", "--branch-from 4 needs --load"),
            ("--branch-from 4 --load {0} --ckpt-step 2", "--branch-from 4 .*not at --ckpt-step 2"),
            ("--branch-from 4 --load {0} --lr-decay-style cosine", "not --lr-decay-style cosine"),
        ],
    )
    def test_what_is_no_branch(self, trunk: Path, flags: str, message: str):
        with pytest.raises(UsageError, match=message):
            pretrain(f"{self.CONSTANT} {flags.format(trunk)}")
