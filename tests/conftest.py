"""Shared fixtures and settings: threads, seeds, single-process Megatron without a launcher."""

import os

# At small sizes, threads cost more than they gain; `make test` sets its own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without .pyc files, recompiling torch and Megatron dominates the startup of each subprocess.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.launcher_variables import is_of_a_launcher

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite runs on the CPU platform
os.fsync = lambda _: None  # no test cuts the power, and the suite writes thousands of files
for variable in filter(is_of_a_launcher, list(os.environ)):
    del os.environ[variable]

# Background jobs of a shell script ignore SIGINT, and child processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("/invariants/", "/cuda_without_a_gpu/", "/end_to_end/", "/evaluation/", "first_gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take minutes first, so that all workers end at the same time."""
    items.sort(key=lambda item: not any(part in str(item.path) for part in LONGEST))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Freeze what imports made, so that garbage collection scans only what tests make."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Unfreeze, or nanobind reports at exit each of its objects that nothing collected."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed every test alike, whichever ran before it, without importing torch."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1234)


@pytest.fixture(autouse=True)
def balance_loss_scale() -> None:
    """Unset the balance loss scale: losses then count once; Megatron keeps a set scale's shape."""
    if moe := sys.modules.get("megatron.core.transformer.moe.moe_utils"):
        moe.MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """Set up one-process model parallel groups over gloo, as pretrain_smlp.py without torchrun.

    Module scope, not session scope: each test file sets up Megatron's globals for itself.
    """
    from support.in_process import forget_router_losses

    from megatron_smlp.platform.one_process import one_process

    with one_process():
        yield
    forget_router_losses()


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return `parse("--flag value ...")` -> checked arguments; drop Megatron's copy afterwards."""
    from support.in_process import MINIMAL, base_for, forget_arguments, prepare_megatron

    from megatron_smlp.flags.parse import parse_arguments

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    prepare_megatron()

    def parse_flags(flags: str, *, base: str = MINIMAL) -> Any:
        forget_arguments()
        return parse_arguments([*base_for(flags, base).split(), *flags.split()])

    yield parse_flags
    forget_arguments()


@pytest.fixture(autouse=True)
def forgotten_plugins() -> Iterator[None]:
    """Unload the plugins that a test loaded, without importing torch."""
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
    """Return the registry of plugins."""
    from megatron_smlp import plugins

    return plugins.register
