"""The speed of a run: wall time of its steps, tokens/s, FLOP/s, and MFU, the share of the peak.

TFLOP/s of a device = tokens/s x needed FLOPs per token (accounting/costs.py) / devices / 10^12
MFU = TFLOP/s of a device / its dense peak
"""

from __future__ import annotations

import re
import time

import torch

# Dense bf16 peak of one device in TFLOP/s (no sparsity), from the vendor's data sheets.
DENSE_PEAK_TFLOPS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A100X": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "V100": 125.0,
    "V100S": 130.0,
}


class StepClock:
    """Measures the wall time of training steps, excluding time reported to `exclude`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.excluded = 0.0
        self.steps = 0

    def step(self) -> None:
        self.steps += 1

    def exclude(self, seconds: float) -> None:
        self.excluded += seconds

    def pop_seconds_per_step(self) -> float:
        """Return the seconds per step since the last call, and restart the clock."""
        seconds = time.perf_counter() - self.start - self.excluded
        steps = max(1, self.steps)
        self.restart()
        return seconds / steps


def duration(seconds: float) -> str:
    """Format seconds as 1h02m, 3m20s or 12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def device_peak_tflops() -> float | None:
    """Return the dense bf16 peak of this device in TFLOP/s, or None if unknown."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    if " MIG " in device:  # a slice of a GPU
        return None
    peaks = (peak for key, peak in DENSE_PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", device))
    return next(peaks, None)
