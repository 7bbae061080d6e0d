"""The device that a process computes on: CUDA where torch finds it, else or by choice the CPU; and
what a process says to CUDA through its environment.

Without a GPU that works, everything here runs on the CPU platform (platform/cpu.py). That is for
machines that have none: a job whose driver is too old for torch's CUDA build would otherwise train
on the CPU, over gloo, and look healthy. This module imports torch only where it is asked: the
choice must be made before anything starts CUDA.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_smlp.errors import UsageError

VISIBLE, CONNECTIONS = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS"
DRIVER = Path("/proc/driver/nvidia/gpus")


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


def limit_connections(args: argparse.Namespace) -> None:
    """Do what launching.training_argv does for a size that only a checkpoint names.

    CUDA has started, and may have read another value: Megatron would stop without it.
    """
    if args.tensor_model_parallel_size > 1:
        os.environ.setdefault(CONNECTIONS, "1")


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
