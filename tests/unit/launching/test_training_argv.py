"""What is read from a training's argv before there is a parser."""

import sys
from pathlib import Path

import pytest
from support.launches import run_command

from megatron_smlp.errors import UsageError
from megatron_smlp.launching.settings import read
from megatron_smlp.launching.supervisor import Supervisor
from megatron_smlp.launching.training_argv import limit_connections
from megatron_smlp.platform import choice
from megatron_smlp.platform.choice import CONNECTIONS

TP_2 = "--tensor-model-parallel-size 2"


@pytest.fixture
def hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stub of nvidia-smi first in PATH, whatever GPU there is; return its folder."""
    smi = tmp_path / "tools" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 9.0\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=":")
    return smi.parent


@pytest.mark.parametrize(
    ("flags", "capability", "given", "expected"),
    [
        (TP_2, "9.0", None, "1"),
        ("--tensor-model-parallel-size=16", "", None, "1"),
        (TP_2, "10.0\n10.0", None, None),
        ("--tensor-model-parallel-size 1", "9.0", None, None),
        (TP_2, "9.0", "32", "32"),
        ("--config top.yaml", "9.0", None, "1"),
        ("--config top.yaml --tensor-model-parallel-size 1", "9.0", None, None),
        ("--config top.yaml --config one.yaml", "9.0", None, None),
        ("", "9.0", None, None),
    ],
)
def test_one_connection_where_megatron_needs_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hopper: Path,
    flags: str,
    capability: str,
    given: str | None,
    expected: str | None,
):
    """A stub of nvidia-smi says which GPU it is."""
    (tmp_path / "base.yaml").write_text("tensor_model_parallel_size: 4\n")
    (tmp_path / "top.yaml").write_text("include: base.yaml\nseq-length: 32\n")
    (tmp_path / "one.yaml").write_text("tensor_model_parallel_size: 1\n")
    (hopper / "nvidia-smi").write_text(f"#!/bin/sh\necho '{capability}'\n")
    monkeypatch.chdir(tmp_path)
    environment = {} if given is None else {CONNECTIONS: given}
    limit_connections(flags.split(), environment)
    assert environment.get(CONNECTIONS) == expected


@pytest.mark.parametrize(("capability", "expected"), [("9.0", {CONNECTIONS: "1"}), ("10.0", {})])
def test_a_size_that_only_a_checkpoint_names(
    hopper: Path, capability: str, expected: dict[str, str]
):
    (hopper / "nvidia-smi").write_text(f"#!/bin/sh\necho {capability}\n")
    environment: dict[str, str] = {}
    choice.limit_connections(2, environment)
    assert environment == expected


def test_launchers_tell_their_ranks(monkeypatch: pytest.MonkeyPatch, hopper: Path):
    monkeypatch.delenv(CONNECTIONS, raising=False)
    for flags, expected in ((TP_2, "1"), ("", None)):
        launcher = Supervisor(read({}, several=False), ["train.py", *flags.split()])
        assert launcher.environment.get(CONNECTIONS) == expected


def test_a_run_says_it_before_cuda_can_start(hopper: Path):
    """CUDA reads the variable as it starts, and only torch can start it."""
    program = f"""
import os, sys, pretrain_smlp

def saw(argv):
    sys.exit(f"{{os.environ[{CONNECTIONS!r}]}} {{'torch' in sys.modules}}")

pretrain_smlp.patched_arguments = saw
pretrain_smlp.main({TP_2.split()})
"""
    done = run_command([sys.executable, "-c", program], code=1, **{CONNECTIONS: ""})
    assert done.stderr == "1 False\n"


def test_a_file_that_is_not_there_is_one_line():
    with pytest.raises(UsageError, match=r"none\.yaml"):
        limit_connections(["--config", "none.yaml"], {})
