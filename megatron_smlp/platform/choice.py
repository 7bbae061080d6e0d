"""Chooses the device of a process: CUDA if torch finds it, else or on request the CPU; and sets the
environment variables that CUDA reads.

Without a working GPU, everything here runs on the CPU platform (platform/cpu.py). That is meant for
machines that have none: with a driver too old for torch's CUDA build, a job would otherwise train
on the CPU, over gloo, and look healthy. This module imports torch only inside functions that need
it: the choice must be made before anything initializes CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import MutableMapping
from pathlib import Path

from megatron_smlp.errors import UsageError

VISIBLE, CONNECTIONS = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS"
DRIVER = Path("/proc/driver/nvidia/gpus")
BLACKWELL = 10
"""Major version of its compute capability."""


def hide_gpus() -> None:
    """Hide all GPUs from this process, for --platform cpu."""
    os.environ[VISIBLE] = ""


def check(platform: str = "auto") -> None:
    """Refuse to fall back to the CPU silently on a machine with an NVIDIA device.

    Raises:
        UsageError: torch cannot use the device; names torch's reason and the remedy.
    """
    import torch

    hidden = os.environ.get(VISIBLE) in ("", "-1")
    if torch.cuda.is_available() or platform == "cpu" or hidden or not has_nvidia_device():
        return
    raise UsageError(
        f"this machine has an NVIDIA device, but torch {torch.__version__} cannot use it: "
        f"{_reason()} Install a driver for CUDA {torch.version.cuda}, or a torch for the driver "
        f"(docs/gpus.md). To use the CPU on purpose: --platform cpu, or {VISIBLE} set to nothing."
    )


def limit_connections(size: int, environment: MutableMapping[str, str]) -> None:
    """Limit CUDA to one connection, so that communication starts in the order it is launched.

    Megatron requires this for tensor parallelism before Blackwell. CUDA reads the variable when it
    initializes, so a launcher must call this, or a program before it imports torch. A size that
    only a checkpoint names comes too late, and Megatron stops without the variable.

    Args:
        size: tensor parallel size.
    """
    if size > 1 and not environment.get(CONNECTIONS) and _capability() < BLACKWELL:
        environment[CONNECTIONS] = "1"


def _capability() -> float:
    """Return the first GPU's compute capability without initializing CUDA; 0 if there is none."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        return float(said.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def has_nvidia_device() -> bool:
    """Return whether the kernel driver knows a GPU, usable by torch or not."""
    return DRIVER.is_dir() and any(DRIVER.iterdir())


def _reason() -> str:
    """Return torch's own error message, cut to one sentence."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).split(". ")[0].rstrip(".") + "."
    return "no device found."
