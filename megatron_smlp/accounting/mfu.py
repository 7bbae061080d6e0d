"""MFU: the share of a device's dense peak that a training reaches by its needed FLOPs.

TFLOP/s of a device = tokens/s x needed FLOPs per token (accounting/costs.py) / devices / 10^12
MFU = TFLOP/s of a device / its dense peak
"""

from __future__ import annotations

import re

# Dense bf16 peaks of one device in TFLOP/s, from the vendor's data sheets (no sparsity).
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


def tflops_per_device(tokens_per_second: float, *, flops_per_token: float, devices: int) -> float:
    """Return TFLOP/s of a device.

    Args:
        flops_per_token: needed ones, forward and backward, summed over the devices.
    """
    return tokens_per_second * flops_per_token / 1e12 / devices


def mfu(tflops: float, *, peak: float | None) -> float | None:
    """Return the share of a device's peak, both in TFLOP/s; None where the peak is not known."""
    return tflops / peak if peak else None


def dense_peak_tflops(device: str) -> float | None:
    """Return the dense bf16 peak of a device, by its name as CUDA gives it; None: not known."""
    if " MIG " in device:  # a slice of it
        return None
    peaks = (peak for key, peak in DENSE_PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", device))
    return next(peaks, None)
