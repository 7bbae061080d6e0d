"""The cases of `make first-gpu`, asserted, and what the stand-in for Transformer Engine assumes.

make test-gpu
"""

import inspect
import json
import os
import sys
from importlib.util import find_spec

import pytest
import torch
from support.first_gpu.cases import CASES
from support.first_gpu.notes import Place
from support.first_gpu.running import Result, run_case
from support.launches import REPOSITORY, run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place("cuda", tmp_path_factory.mktemp("first_gpu"))


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """Of the cases so far, in their order: some read what others wrote."""
    return {}


@pytest.mark.parametrize("name", CASES)
def test_case(place: Place, results: dict[str, Result], name: str):
    results[name] = result = run_case(CASES[name], place, results)
    assert result.verdict != "failed", result.notes.lines
    if result.verdict == "not run":
        pytest.skip("; ".join(text for _, text in result.notes.lines))


def test_the_cpu_platform_does_nothing():
    code = (
        "import torch; before = torch.cuda.current_device, torch.empty\n"
        "from megatron_smlp.platform import cpu; cpu.apply()\n"
        "assert (torch.cuda.current_device, torch.empty) == before"
    )
    run_command([sys.executable, "-c", code], **os.environ)


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="it is not installed")
def test_the_stand_in_takes_no_argument_that_transformer_engine_lacks():
    import transformer_engine.pytorch as te

    code = (
        "import json; from transformer_engine.signatures import MODULES\n"
        "print(json.dumps({name: sum(of, ()) for name, of in MODULES.items()}))"
    )
    stand_in = REPOSITORY / "tests" / "support" / "transformer_engine_stub"
    told = json.loads(run_command([sys.executable, "-c", code], PYTHONPATH=str(stand_in)).stdout)
    for name, arguments in told.items():
        classes = inspect.getmro(getattr(te, name))
        known = {argument for c in classes for argument in inspect.signature(c.__init__).parameters}
        assert set(arguments) <= known, name
