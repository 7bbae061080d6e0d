"""Fixtures that all tests share: threads, seeds, one process of Megatron without a launcher."""

import os

# Small sizes lose more to threads than they win; `make test` sets its own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiling torch and Megatron anew is most of the start of each process that a test starts.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.launcher_variables import is_of_a_launcher

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite holds the CPU platform
os.fsync = lambda _: None  # no test cuts the power, and thousands of files are written
for variable in filter(is_of_a_launcher, list(os.environ)):
    del os.environ[variable]

# What a shell script starts in the background ignores Ctrl-C, and passes that on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("/invariants/", "/cuda_without_a_gpu/", "/end_to_end/", "/evaluation/", "first_gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: all workers then end at the same time."""
    items.sort(key=lambda item: not any(part in str(item.path) for part in LONGEST))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Let collections of garbage look at what tests make, not at what was imported for them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Else nanobind tells at the end, of each object of its own, that nothing collected it."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whichever ran before (and no import of torch)."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1234)


@pytest.fixture(autouse=True)
def balance_loss_scale() -> None:
    """None is set, so that balance losses count once; of one that was, Megatron keeps the shape."""
    if moe := sys.modules.get("megatron.core.transformer.moe.moe_utils"):
        moe.MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """Model parallel groups of one process over gloo, as pretrain_smlp.py has without torchrun.

    A module's, not the session's: what the next file sets up of Megatron's globals is its own.
    """
    from support.in_process import forget_router_losses

    from megatron_smlp.platform.one_process import one_process

    with one_process():
        yield
    forget_router_losses()


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`parse("--flag value ...")` -> checked arguments; Megatron's global copy goes afterwards."""
    from support.in_process import MINIMAL, base_for, forget_arguments, prepare_megatron

    from megatron_smlp.flags.parse import parse_arguments

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    prepare_megatron()

    def parse_words(words: str, *, base: str = MINIMAL) -> Any:
        forget_arguments()
        return parse_arguments([*base_for(words, base).split(), *words.split()])

    yield parse_words
    forget_arguments()


@pytest.fixture(autouse=True)
def forgotten_plugins() -> Iterator[None]:
    """What a test loads of plugins is gone after it (and no import of torch)."""
    files = sys.modules.get("megatron_smlp.plugin_files")
    take_back = files.snapshot() if files else None
    yield
    if take_back:
        take_back()
    if "megatron_smlp.hf.modeling_plugin" in sys.modules:
        from transformers import AutoModelForCausalLM

        from megatron_smlp.hf import SMLPConfig, SMLPForCausalLM

        AutoModelForCausalLM.register(SMLPConfig, SMLPForCausalLM, exist_ok=True)


@pytest.fixture
def registry(forgotten_plugins: None) -> Any:
    """What plugins register."""
    from megatron_smlp import plugins

    return plugins.register
