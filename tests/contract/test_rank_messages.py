"""Megatron's loop gets the answers that it would ask the ranks for, and asks no one."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from megatron.training import global_vars, training
from megatron.training.dist_signal_handler import DistributedSignalHandler
from megatron.training.utils import common_utils
from support.in_process import prepare_megatron

from megatron_smlp.megatron_patches import rank_messages
from megatron_smlp.megatron_patches.rank_messages import _Loop
from megatron_smlp.training.agreement import Agreed, StepAgreement


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu(megatron: None) -> None:
    prepare_megatron()


def loop(answer: Agreed | None = None, *, are_alike: bool = True) -> _Loop:
    made = _Loop(lambda: answer)
    made.are_alike = are_alike
    return made


def refuses(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("asked the ranks")


def test_it_wraps_exactly_its_rows_and_puts_them_back():
    before = dict(vars(training))
    with rank_messages.installed(lambda: None):
        changed = {name for name, value in vars(training).items() if before[name] is not value}
    assert changed == {
        "setup_model_and_optimizer", "training_log", "checkpoint_and_decide_exit",
        "get_signal_handler", "logical_and_across_model_parallel_group",
        "reduce_max_stat_across_model_parallel_group", "evaluate_and_print_results",
    }  # fmt: skip
    assert all(before[name] is value for name, value in vars(training).items())


class TestOfOneKnowledge:
    @pytest.mark.parametrize("stat", [None, 0.1, 1e-30, 3.0, float("inf")])
    def test_the_largest_is_megatrons(self, stat: float | None):
        theirs = common_utils.reduce_max_stat_across_model_parallel_group(stat)
        assert loop().around_max(refuses)(stat, group=None) == theirs

    @pytest.mark.parametrize("is_done", [True, False])
    def test_so_is_success(self, is_done: bool):
        theirs = common_utils.logical_and_across_model_parallel_group(is_done)
        assert loop().around_and(refuses)(is_done, group=None) is theirs is is_done

    def test_ranks_that_may_differ_are_asked(self):
        group = object()
        unlike = loop(are_alike=False)
        assert unlike.around_max(lambda stat, of: (stat, of))(0.5, group=group) == (0.5, group)
        assert unlike.around_and(lambda done, of: (done, of))(True, group=group) == (True, group)


class TestSignals:
    @pytest.mark.parametrize("is_signalled", [True, False])
    def test_of_the_step(self, is_signalled: bool, monkeypatch: pytest.MonkeyPatch):
        args = SimpleNamespace(exit_duration_in_mins=None)
        monkeypatch.setattr(rank_messages, "get_args", lambda: args)
        made = loop(Agreed(None, is_signalled, False))
        handler = made.around_handler(refuses)
        decide = made.around_exit(lambda: any(handler().signals_received()))
        assert decide() is is_signalled

    def test_without_a_step_all_ranks_are_asked(self, monkeypatch: pytest.MonkeyPatch):
        """As where --iterations-to-skip leaves a step out."""
        args = SimpleNamespace(exit_duration_in_mins=3)
        monkeypatch.setattr(rank_messages, "get_args", lambda: args)
        made, megatrons = loop(None), object()
        handler = made.around_handler(lambda: megatrons)
        assert made.around_exit(lambda: (handler(), args.exit_duration_in_mins))() == (megatrons, 3)

    def test_after_an_evaluation_all_ranks_are_asked(self, monkeypatch: pytest.MonkeyPatch):
        """A signal that comes in it ends the run behind it, and not a step later."""
        args = SimpleNamespace(exit_duration_in_mins=None)
        monkeypatch.setattr(rank_messages, "get_args", lambda: args)
        answers, megatrons = [Agreed(None, False, False)], object()
        made = _Loop(lambda: answers.pop() if answers else None)
        made.forget()
        assert made.around_exit(made.around_handler(lambda: megatrons))() is megatrons

    def test_where_megatron_keeps_them(self):
        with DistributedSignalHandler() as handler:
            assert handler._signal_received is False
        assert inspect.getsource(training.checkpoint_and_decide_exit).count("signals_received") == 1


@pytest.mark.parametrize(("is_over", "seen"), [(True, 3), (False, None)])
def test_the_time_is_looked_at_where_it_is_over(
    is_over: bool, seen: int | None, monkeypatch: pytest.MonkeyPatch
):
    args = SimpleNamespace(exit_duration_in_mins=3)
    monkeypatch.setattr(rank_messages, "get_args", lambda: args)
    decide = loop(Agreed(None, False, is_over)).around_exit(lambda: args.exit_duration_in_mins)
    assert decide() == seen
    assert args.exit_duration_in_mins == 3
    assert hasattr(training, "_TRAIN_START_TIME")


class TestAgreement:
    @pytest.mark.parametrize("nonfinite", [None, False, True])
    @pytest.mark.parametrize("is_signalled", [False, True])
    @pytest.mark.parametrize("limit", [None, 1, 1000])
    def test_of_one_rank(
        self,
        nonfinite: bool | None,
        is_signalled: bool,
        limit: int | None,
        monkeypatch: pytest.MonkeyPatch,
    ):
        handler = SimpleNamespace(_signal_received=is_signalled)
        monkeypatch.setattr(global_vars, "_GLOBAL_SIGNAL_HANDLER", handler)
        monkeypatch.setattr(training, "_TRAIN_START_TIME", training.time.time() - 600)
        args: Any = SimpleNamespace(exit_duration_in_mins=limit)
        found = None if nonfinite is None else torch.tensor(nonfinite)
        agreement = StepAgreement(args, pop_nonfinite=lambda: found)
        assert agreement.take() is None
        agreement.send()
        expected = Agreed(0 if nonfinite else None, is_signalled, limit == 1)
        assert agreement.read() == agreement.take() == expected
        assert agreement.take() is None


class TestSetup:
    def test_a_loss_scale_of_one_is_kept_on_the_host(self):
        """The model's losses are multiplied on the device, as before."""
        weight = torch.nn.Parameter(torch.ones(2))
        config: Any = SimpleNamespace(timers=None)
        inner = FP32Optimizer(torch.optim.SGD([weight], lr=0.1), config, lambda *_: None)
        optimizer = ChainedOptimizer([inner])
        rank_messages._keep_scale_on_host(optimizer)
        assert optimizer.get_loss_scale().item() == 1
        inner._scale = torch.tensor([4.0])
        assert torch.equal(optimizer.scale_loss(torch.tensor(3.0)), torch.tensor([12.0]))

    def test_losses_add_up_as_megatrons_do(self, monkeypatch: pytest.MonkeyPatch):
        """Of three steps, one with a report in between."""
        monkeypatch.setattr(rank_messages, "_writes", lambda iteration: iteration == 2)

        @functools.wraps(training.training_log)
        def megatrons(losses: Any, totals: Any, *_: Any) -> None:
            for key in losses:
                zero = torch.tensor([0.0], dtype=torch.float)
                totals[key] = totals.get(key, zero) + losses[key]

        ours: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        log = loop().around_log(megatrons)
        for iteration in (1, 2, 3):
            losses = {"lm loss": torch.randn(()), "suffix loss": torch.randn(())}
            log(losses, ours, 0.1, iteration, 1.0, True, 0, *[None] * 4)
            megatrons(losses, theirs)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    def test_a_skipped_steps_losses_go_to_megatron(self):
        """It counts those that are not finite."""
        losses, totals = {"lm loss": torch.tensor(float("nan"))}, {}
        log = functools.wraps(training.training_log)(lambda given, *_: given)
        assert loop().around_log(log)(losses, totals, 0.1, 1, 1.0, True, 1, *[None] * 4)
        assert not totals
