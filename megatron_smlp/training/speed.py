"""The speed of a run: wall time of its steps, tokens/s, FLOP/s, and their share of the peak."""

from __future__ import annotations

import time

import torch

from megatron_smlp.accounting import mfu


class StepClock:
    """Wall time of training steps alone: what was spent on validating and saving is left out."""

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
        """Seconds a step since the last call."""
        seconds = time.perf_counter() - self.start - self.excluded
        steps = max(1, self.steps)
        self.restart()
        return seconds / steps


def speed_fields(
    clock: StepClock,
    *,
    tokens: int,
    flops_per_token: float,
    devices: int,
    waited: float,
    left: int,
    peak: float | None,
) -> dict[str, float | None]:
    """Return the speed since the last line of metrics.jsonl, as its fields, and restart the clock.

    Args:
        tokens: since the last line: a schedule may change the batch.
        flops_per_token: summed over the devices.
        waited: seconds in which rank 0 waited for data.
        left: steps to the end.
        peak: TFLOP/s of a device, where it is known.
    """
    steps = max(1, clock.steps)
    seconds = clock.pop_seconds_per_step()
    per_second = tokens / steps / seconds
    tflops = mfu.tflops_per_device(per_second, flops_per_token=flops_per_token, devices=devices)
    return {
        "seconds_per_iteration": seconds,
        "tokens_per_second": per_second,
        "tflops_per_device": tflops,
        "mfu": mfu.mfu(tflops, peak=peak),
        "data_wait_share": waited / steps / seconds,
        "eta_seconds": left * seconds,
    }


def duration(seconds: float) -> str:
    """1h02m, 3m20s, 12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def device_peak_tflops() -> float | None:
    """Dense bf16 peak of this device in TFLOP/s, or None where it is not known."""
    if not torch.cuda.is_available():
        return None
    return mfu.dense_peak_tflops(torch.cuda.get_device_name())
