"""Whole runs in this process: what is logged, what is shown, and how a broken loss ends one."""

import math
import re
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from support.in_process import pretrained
from support.launches import records

from megatron_smlp.errors import NonFiniteLossError, ServiceError
from megatron_smlp.ops import triton_ready
from megatron_smlp.training import parts, slow_paths
from megatron_smlp.training.forward import ForwardStep

GMLP = "--architecture gmlp --log-interval 1"
SWITCH = (
    "--architecture transformer --num-attention-heads 4 --token-router switch --num-experts 4 "
    "--moe-layer-freq 2 --lr 1e-5"
)
# Steps are so large that the first ruins the weights: the second step's loss is not finite.
DIVERGING = f"{GMLP} --lr 1e30 --lr-decay-style constant"


class TestMetrics:
    @pytest.fixture(scope="class")
    def logged(self, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("metrics")
        with pretrained(f"{GMLP} --log-dir {folder} --eval-interval 2 --min-lr 1e-4"):
            return records(folder)

    def test_every_step_has_every_number(self, logged: list[dict[str, Any]]):
        steps = [record for record in logged if "loss" in record]
        assert [step["iteration"] for step in steps] == [1, 2, 3, 4]
        assert [step["consumed_samples"] for step in steps] == [2, 4, 6, 8]
        assert [step["consumed_tokens"] for step in steps] == [32, 64, 96, 128]
        for step in steps:
            assert step["perplexity"] == pytest.approx(math.exp(step["loss"]))
            assert step["grad_norm"] > 0
            assert 1e-4 <= step["learning_rate"] <= 1e-3
            assert step["tokens_per_second"] == pytest.approx(32 / step["seconds_per_iteration"])
            left = 4 - step["iteration"]
            assert step["eta_seconds"] == pytest.approx(left * step["seconds_per_iteration"])
            assert step["mfu"] is None, "the peak of this device is not known"
            assert not step["skipped"]


def test_the_log_interval_thins_the_lines_and_the_peak_gives_the_share_of_it(tmp_path: Path):
    """Four steps, one line every third: the third, and the last."""
    with pretrained(f"{GMLP} --log-dir {tmp_path} --log-interval 3 --peak-tflops 0.5"):
        steps = [record for record in records(tmp_path) if "loss" in record]
    assert [step["iteration"] for step in steps] == [3, 4]
    for step in steps:
        assert step["mfu"] == pytest.approx(step["tflops_per_device"] / 0.5)


def test_slow_paths_of_any_rank_are_shown_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
):
    """One that a layer here logs of itself, and one of another pipeline stage."""
    call = ForwardStep.__call__

    def without_kernels(self: ForwardStep, *args: Any, **kwargs: Any) -> Any:
        triton_ready._say_once("mixing", "this GPU is too old")
        return call(self, *args, **kwargs)

    monkeypatch.setattr(ForwardStep, "__call__", without_kernels)
    monkeypatch.setattr(slow_paths, "gathered", lambda own: [own, ["experts, slower"], own])
    with pretrained(GMLP):
        shown = capfd.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(shown) if line.startswith("iteration 1/4"))
    ours = "mixing runs without Triton kernels, and slower: this GPU is too old."
    warnings = [line for line in shown if line.startswith("WARNING: ")]
    assert warnings == shown[first - 2 : first] == [f"WARNING: {ours}", "WARNING: experts, slower"]
    assert caplog.messages.count(ours) == 1


def test_a_run_ends_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """By the second step an hour has passed; that step is saved."""
    from megatron_smlp.training.agreement import StepAgreement

    steps, send = [], StepAgreement.send

    def sent(self: StepAgreement) -> None:
        steps.append(self)
        if len(steps) == 2:
            self.began -= 3601
        send(self)

    monkeypatch.setattr(StepAgreement, "send", sent)
    flags = f"{GMLP} --exit-duration-in-mins 60 --save {tmp_path}"
    with pretrained(flags):
        pass
    assert (
        f"stopped at iteration 2 (--exit-duration-in-mins): saved to {tmp_path}"
        in capfd.readouterr().out
    )
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_last_evaluation_without_time_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    from megatron_smlp.training import evaluating

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "evaluate", lambda *_, **__: (None, None, True))
        with pretrained(f"{GMLP} --save {tmp_path}"):
            pass
    assert "no time left to evaluate: rerun the same command" in capfd.readouterr().out
    with pretrained(f"{GMLP} --save {tmp_path}"):
        pass
    assert "test_loss" in records(tmp_path)[-1]


def test_an_interval_that_ends_with_the_run_stops_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    with pretrained(f"{GMLP} --exit-interval 2 --train-iters 2 --save {tmp_path}"):
        pass
    assert "stopped" not in capfd.readouterr().out
    assert "test_loss" in records(tmp_path)[-1]


@pytest.mark.parametrize(
    ("when", "last"),
    [
        ("before the message of step 2", 2),
        ("behind the message of step 3", 4),
        ("in the evaluation after step 2", 2),
    ],
)
def test_a_signal_ends_a_run_when_its_step_is_done(
    when: str,
    last: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    from megatron_smlp.training import evaluating
    from megatron_smlp.training.agreement import StepAgreement

    send, evaluate = StepAgreement.send, evaluating.evaluate

    def sent(self: StepAgreement) -> None:
        step = self.args.curr_iteration + 1
        if when == f"before the message of step {step}":
            signal.raise_signal(signal.SIGTERM)
        send(self)
        if when == f"behind the message of step {step}":
            signal.raise_signal(signal.SIGTERM)

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        if "evaluation" in when:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(StepAgreement, "send", sent)
    monkeypatch.setattr(evaluating, "evaluate", evaluated)
    flags = f"{GMLP} --train-iters 9 --eval-interval 2 --save {tmp_path}"
    with pretrained(flags):
        pass
    assert f"stopped at iteration {last} (a signal): saved to {tmp_path}" in capfd.readouterr().out
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(last)
    assert ("validation_loss" in records(tmp_path)[-1]) == ("evaluation" in when)


def test_a_resumed_run_evaluates_first_what_a_signal_left_no_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from megatron_smlp.training.agreement import StepAgreement

    flags = f"{GMLP} --train-iters 3 --eval-interval 2 --save {tmp_path}"
    with monkeypatch.context() as patch:
        patch.setattr(StepAgreement, "_is_late", lambda it: it.args.curr_iteration == 1)
        with pretrained(flags):
            pass
    with pretrained(flags):
        pass
    found = [(it["iteration"], "validation_loss" in it) for it in records(tmp_path)[:4]]
    assert found == [(1, False), (2, False), (2, True), (3, False)]


def test_skipped_steps_count_in_no_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of two steps, one: the balance loss of a nearly uniform router is close to 1."""
    from megatron_smlp.training import loop

    monkeypatch.setattr(loop, "may_update", lambda args, *_: args.curr_iteration == 0)
    with pretrained(f"{SWITCH} --train-iters 2 --log-interval 2 --log-dir {tmp_path}"):
        pass
    found, *_ = re.findall(r"load_balancing_loss: (\S+)", (tmp_path / "megatron.log").read_text())
    assert 0.9 < float(found) < 1.3


class TestNonFiniteLoss:
    def test_stop_names_rank_and_step_and_what_to_do(self, tmp_path: Path):
        message = (
            r"non-finite loss on rank 0 at iteration 2: stopped before the update.*--nonfinite"
        )
        with (
            pytest.raises(NonFiniteLossError, match=message) as caught,
            pretrained(f"{DIVERGING} --log-dir {tmp_path}"),
        ):
            pass
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 3
        assert [record["iteration"] for record in records(tmp_path)] == [1]

    def test_skip_goes_on_and_counts_nothing_as_trained(self, tmp_path: Path, capfd):
        with pretrained(f"{DIVERGING} --log-dir {tmp_path} --nonfinite-loss skip"):
            output = capfd.readouterr().out
        steps = [record for record in records(tmp_path) if "loss" in record]
        assert [step["skipped"] for step in steps] == [False, True, True, True]
        assert "non-finite loss on rank 0 at iteration 2: this step's update is skipped" in output
        assert not math.isfinite(float(steps[1]["loss"]))

    @pytest.mark.parametrize("clip_grad", [0, 1])
    def test_gradients_under_a_finite_loss(
        self, clip_grad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """The root's infinite derivative at 0 times the 0 within is NaN, as in an overflow."""
        whole = ForwardStep._loss

        def overflowing(*given: Any) -> Any:
            loss, *rest = whole(*given)
            return (loss + torch.sqrt(loss * 0), *rest)

        monkeypatch.setattr(ForwardStep, "_loss", overflowing)
        flags = f"{GMLP} --clip-grad {clip_grad} --log-dir {tmp_path}"
        message = "gradient norm nan with a finite loss at iteration 1: stopped before"
        with pytest.raises(NonFiniteLossError, match=message), pretrained(flags):
            pass
        with pretrained(f"{flags} --nonfinite-loss skip --lr-warmup-iters 3"):
            steps = [record for record in records(tmp_path) if "loss" in record]
        assert [step["skipped"] for step in steps] == [True] * 4
        assert len({step["learning_rate"] for step in steps}) == 1  # the schedule waits too
        assert all(math.isfinite(step["loss"]) for step in steps)


def test_weights_and_biases_get_the_loss_without_a_folder_for_tensorboard(
    tmp_path: Path, monkeypatch
):
    """Megatron sends W&B what it sends to TensorBoard, and nothing if that has no folder."""
    import wandb

    wandb.teardown()  # a session started by another test has already read the environment
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = f"{GMLP} --eval-interval 2 --wandb-project p --wandb-exp-name n --save {tmp_path}"
    with pretrained(f"{flags} --train-iters 2"):
        wandb.finish()
    (file,) = tmp_path.glob("wandb/wandb/offline-run-*/run-*.wandb")
    sent = file.read_bytes()
    for name in (b"grad-norm", b"learning-rate", b"lm loss validation", b"run/tokens_per"):
        assert name in sent
    assert list(tmp_path.glob("tensorboard/events*"))


def test_weights_and_biases_without_a_login_are_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import wandb

    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # without a .netrc
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    flags = f"{GMLP} --wandb-project p --wandb-exp-name n --save {tmp_path} --train-iters 1"
    with (
        pytest.raises(ServiceError, match=r"--wandb-project p: .*wandb login.*WANDB_MODE=offline"),
        pretrained(flags),
    ):
        pass


@pytest.mark.parametrize("trains", [True, False])
def test_parameters_are_gathered_ahead_for_a_training_alone(
    trains: bool, monkeypatch: pytest.MonkeyPatch
):
    """--skip-train builds chunks that DDP does not wrap."""
    monkeypatch.setattr(parts, "get_timers", lambda: None)
    args = Namespace(
        overlap_grad_reduce=True,
        align_grad_reduce=True,
        overlap_param_gather=True,
        align_param_gather=True,
    )
    chunk: Any = torch.nn.Identity()
    if trains:
        chunk = DistributedDataParallel.__new__(DistributedDataParallel)
    config = SimpleNamespace()
    parts._connect(SimpleNamespace(args=args, model=[chunk], config=config, optimizer=None))
    assert hasattr(config, "param_sync_func") is trains
