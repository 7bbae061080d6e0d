"""The device that a process computes on: CUDA where torch finds it, else or by choice the CPU; and
what a process says to CUDA through its environment.

Without a GPU that works, everything here runs on the CPU platform (platform/cpu.py). That is for
machines that have none: a job whose driver is too old for torch's CUDA build would otherwise train
on the CPU, over gloo, and look healthy. This module imports torch only where it is asked: the
choice must be made before anything starts CUDA.
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
"""Compute capability."""


def hide_gpus() -> None:
    """Do without GPUs in this process, for --platform cpu."""
    os.environ[VISIBLE] = ""


def check(platform: str = "auto") -> None:
    """Refuse a CPU that nobody chose, on a machine with an NVIDIA device.

    Raises:
        UsageError: with torch's reason and the remedy.
    """
    import torch

    hidden = os.environ.get(VISIBLE) in ("", "-1")
    if torch.cuda.is_available() or platform == "cpu" or hidden or not has_nvidia_device():
        return
    raise UsageError(
        f"this machine has an NVIDIA device, and torch {torch.__version__} cannot use it: "
        f"{_reason()} Install a driver for CUDA {torch.version.cuda}, or a torch for the driver "
        "(docs/gpus.md). To compute on the CPU on purpose: --platform cpu, or "
        f"{VISIBLE} set to nothing."
    )


def limit_connections(size: int, environment: MutableMapping[str, str]) -> None:
    """Give CUDA one queue, so that communication starts in the order in which it is asked for.

    Megatron insists on it for tensor parallelism before Blackwell. CUDA reads the variable as it
    starts: this is for launchers, and a program before it imports torch. A size that only a
    checkpoint names comes later, and Megatron would stop without it.

    Args:
        size: tensor parallel.
    """
    if size > 1 and not environment.get(CONNECTIONS) and _capability() < BLACKWELL:
        environment[CONNECTIONS] = "1"


def _capability() -> float:
    """Return the first GPU's, without starting CUDA; 0 where there is none."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        return float(said.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def has_nvidia_device() -> bool:
    """Return whether the kernel's driver knows a GPU, whatever torch makes of it."""
    return DRIVER.is_dir() and any(DRIVER.iterdir())


def _reason() -> str:
    """torch's own words, one sentence."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).split(". ")[0].rstrip(".") + "."
    return "it finds no device."
