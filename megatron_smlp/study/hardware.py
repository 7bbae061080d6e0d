"""Name a kind of machine by its processor and GPUs."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path


@functools.cache  # a driver may take a second to answer
def hardware() -> str:
    """Return a folder name that describes this machine's processor and GPUs."""
    return "-".join([_processor(), *_gpus()])


def _gpus() -> list[str]:
    """Return `8x` and the words of the GPU's name; empty if there is no GPU or none is visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True, check=False)
    models = [] if names.returncode else names.stdout.splitlines()
    count = len(visible.split(",")) if visible else len(models)
    return [f"{count}x", *_words(models[0])] if models else []


def _processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    title = match[1] if match else platform.processor() or platform.machine()
    return "-".join(_words(title)) or "unknown"


def _words(title: str) -> list[str]:
    plain = re.sub(r"\(.*?\)|@.*|\b(cpu|processor)\b|\d+-core", " ", title.lower())
    return re.findall(r"[a-z0-9]+", plain)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""
