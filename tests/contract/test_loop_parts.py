"""The parts of Megatron that training/loop.py and step.py call have the shape they rely on."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import megatron.core
import megatron.training
import pytest
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.training import global_vars, training
from megatron.training.dist_signal_handler import DistributedSignalHandler
from megatron.training.utils import common_utils
from support.in_process import prepare_megatron

import megatron_smlp
from megatron_smlp.training.agreement import Agreed, StepAgreement
from megatron_smlp.training.megatron_log import TIMERS
from megatron_smlp.training.step import GuardedUpdate, _rounded


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu(megatron: None) -> None:
    prepare_megatron()


def test_an_evaluation_returns_losses_and_whether_the_time_is_over():
    source = inspect.getsource(training.evaluate)
    assert "return total_loss_dict, collected_non_loss_data, False" in source
    assert "return None, None, True" in source


def test_an_optimizer_asks_itself_for_the_norm_and_the_update():
    """`step` calls the methods as attributes of the object, so that they can be replaced there."""
    source = inspect.getsource(ChainedOptimizer.step)
    assert "self.step_with_ready_grads()" in source
    assert "self.get_grad_norm()" in source


def test_every_timer_that_is_logged_is_one_of_megatrons_or_ours():
    """Timers.log leaves out, silently, what nobody started."""
    roots = [*megatron.core.__path__, *megatron.training.__path__, *megatron_smlp.__path__]
    paths = [path for root in roots for path in Path(root).rglob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in paths)
    started = re.findall(r"""timers\(\s*["']([\w-]+)""", source)
    assert set(" ".join(TIMERS).split()) <= set(started)


class Optimizer:
    param_groups: ClassVar[list[Any]] = []

    def __init__(self, order: list[str], *, overflows: bool) -> None:
        self.order, self.overflows = order, overflows

    def step_with_ready_grads(self) -> bool:
        self.order.append("update")
        return True

    def get_grad_norm(self) -> float:
        self.order.append("norm")
        return 0.5

    def step(self) -> tuple[bool, float | None, None]:
        if self.overflows:
            return False, None, None
        norm = self.get_grad_norm()
        return self.step_with_ready_grads(), norm, None


@pytest.mark.parametrize("is_finite", [True, False])
@pytest.mark.parametrize("overflows", [True, False])
def test_an_update_is_held_back_after_the_gradient_norm_is_known(is_finite: bool, overflows: bool):
    """`may_update` is asked once, whether Megatron reaches the update or not."""
    order: list[str] = []

    def may_update(norm: float | None) -> bool:
        order.append(f"asked with {norm}")
        return is_finite

    optimizer = Optimizer(order, overflows=overflows)
    update = GuardedUpdate(optimizer, agree=lambda: order.append("sent"), may_update=may_update)
    for _ in range(2):
        order.clear()
        updated = is_finite and not overflows
        assert update() == ((True, 0.5, None) if updated else (False, None, None))
        asked = ["asked with None"] if overflows else ["norm", "asked with 0.5"]
        assert order == ["sent", *asked, *(["update"] if updated else [])]


def test_a_norm_on_the_device_is_read_once_and_before_the_update():
    order: list[str] = []

    class Norm:
        def __float__(self) -> float:
            order.append("read")
            return 0.5

    optimizer = Optimizer(order, overflows=False)
    optimizer.get_grad_norm = Norm  # type: ignore[assignment]
    update = GuardedUpdate(optimizer, agree=lambda: None, may_update=lambda _: True)
    assert update() == (True, 0.5, None)
    assert order == ["read", "update"]


@pytest.mark.parametrize("norm", [None, 0.1, 1e-30, 3.0, float("inf")])
def test_a_norm_that_no_rank_is_asked_for_is_megatrons(norm: float | None):
    assert _rounded(norm) == common_utils.reduce_max_stat_across_model_parallel_group(norm)


@pytest.mark.parametrize("nonfinite", [None, False, True])
@pytest.mark.parametrize("is_signalled", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 1000])
def test_what_one_rank_agrees_on(
    nonfinite: bool | None,
    is_signalled: bool,
    limit: int | None,
    monkeypatch: pytest.MonkeyPatch,
):
    handler = SimpleNamespace(_signal_received=is_signalled)
    monkeypatch.setattr(global_vars, "_GLOBAL_SIGNAL_HANDLER", handler)
    args: Any = SimpleNamespace(exit_duration_in_mins=limit)
    found = None if nonfinite is None else torch.tensor(nonfinite)
    began = training.time.time() - 600
    agreement = StepAgreement(args, pop_nonfinite=lambda: found, began=began)
    agreement.send()
    assert agreement.read() == Agreed(
        0 if nonfinite else None,
        "a signal" if is_signalled else "--exit-duration-in-mins" if limit == 1 else "",
    )


def test_where_megatron_keeps_a_signal():
    with DistributedSignalHandler() as handler:
        assert handler._signal_received is False
