"""A run says where its model is not the one that the accounting counts, in any layout (MODEL)."""

from pathlib import Path

import pytest
from support.in_process import pretrained

from megatron_smlp.accounting.costs import Cost
from megatron_smlp.errors import AccountingError
from megatron_smlp.training import parameter_count

RUN = "--architecture gmlp --train-iters 1 --eval-iters 0"


@pytest.fixture
def one_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = parameter_count.model_cost
    monkeypatch.setattr(
        parameter_count, "model_cost", lambda shape: counted(shape) + Cost(replicated=-1)
    )


@pytest.mark.usefixtures("one_too_few")
def test_a_difference_ends_a_strict_run():
    with pytest.raises(AccountingError, match=r"has ([\d,]+) parameters, but .* counts"):  # noqa: SIM117
        with pretrained(RUN.replace("--architecture", "--spec megatron_smlp.architectures")):
            pass


@pytest.mark.usefixtures("one_too_few")
def test_a_difference_is_a_warning_else(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    from support.in_process import MINIMAL

    with pretrained(f"{RUN} --log-dir {tmp_path}", base=MINIMAL.replace("--strict-accounting", "")):
        shown = capfd.readouterr().out
    assert "WARNING: the model has" in shown
    assert "iteration 1/1" in shown
