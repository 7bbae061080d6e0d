"""Finds the machine that the others wait for.

Every rank's step takes as long as the slowest rank's, so step times alone cannot tell which rank
that is. At every log line two measures are compared:

    own part   seconds of this rank's forward passes in a step, including getting their batches;
               compared within a pipeline stage, whose ranks have the same layers. Passes only,
               because between them a stage waits for the others, and a fast one may wait longest
    sending    seconds that 64 KiB take from one machine to the next

A machine is reported when one measure is over 1.5 times the median, and more than 20 ms and 3 % of
a step (about a tenth of its forward passes) above it, in three log lines in a row. Ranks that
exchange tokens within a pass are equally slow: any of an expert parallel group may be the cause.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from megatron_smlp.collectives import gathered

RATIO = 1.5
SHARE = 0.03
"""Minimum excess over the median, as a share of a step: less is noise, and costs little."""
LEAST = 0.02
"""Minimum excess in seconds: the operating system takes as much now and then."""
LINES = 3
PROBE_BYTES = 1 << 16


class OwnPart:
    """Times this rank's own part of each step: by CUDA events on a GPU, by the clock on a CPU."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.steps: set[int] = set()
        self.parts: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def timed(self, step: int) -> Iterator[None]:
        """Time a forward pass as part of `step`, unless it belongs to an evaluation."""
        if not torch.is_grad_enabled():
            yield
            return
        began = self._now()
        yield
        self.steps.add(step)
        self.parts.append((began, self._now()))

    def forget(self) -> None:
        """Drop all measurements."""
        self.parts.clear()
        self.steps.clear()

    def pop_seconds(self) -> float:
        """Return the mean seconds per step since the last call. Waits for the GPU."""
        parts, steps = list(self.parts), len(self.steps)
        self.forget()
        if self.on_gpu and parts:
            parts[-1][1].synchronize()
        seconds = [b.elapsed_time(e) / 1000 if self.on_gpu else e - b for b, e in parts]
        return sum(seconds) / max(1, steps)


@dataclass(frozen=True)
class SlowRank:
    """A rank that the others wait for, by one measure."""

    what: str
    rank: int
    host: str
    ratio: float

    def __str__(self) -> str:
        return (
            f"WARNING: {self.host} (rank {self.rank}) {self.what}: {self.ratio:.1f} times the "
            f"median, in the last {LINES} log lines"
        )


class SlowHosts:
    """Compares all ranks. Every method is collective.

    Args:
        timeout: timeout of a message between machines; torch's default is half an hour, whatever
            the other groups have.
        stage: pipeline stage of this rank.
        are_alone: whether each rank's pass is its own, without experts of other ranks in it.
    """

    def __init__(self, timeout: timedelta, *, stage: int = 0, are_alone: bool = True) -> None:
        self.hosts: list[str] = gathered(socket.gethostname())
        self.stages: list[int] = gathered(stage)
        self.leaders = sorted({self.hosts.index(host) for host in self.hosts})
        self.links: Any = None
        if len(self.leaders) > 1:
            self.links = torch.distributed.new_group(self.leaders, timeout=timeout, backend="gloo")
        others = "" if are_alone else ", or another rank of its expert parallel group does"
        self.computing = _Streak(f"computes slowly{others}")
        self.sending = _Streak("sends slowly")

    def find(self, own_part: float, *, step: float) -> list[SlowRank]:
        """Return the ranks that the others wait for, the same on every rank.

        Args:
            own_part: seconds that this rank's own part of a step took.
            step: seconds per step; rank 0's value is used.
        """
        ranks = gathered((own_part, self._receive_seconds(), step))
        parts, receiving, (step, *_) = zip(*ranks, strict=True)
        # Each leader receives from the one before it, so its wait measures that one's sending.
        sending = {
            leader: receiving[self.leaders[(at + 1) % len(self.leaders)]]
            for at, leader in enumerate(self.leaders)
        }
        slowest = (
            self.computing.next(self._slowest_stage(parts), step=step, hosts=self.hosts),
            self.sending.next(sending if self.links else {}, step=step, hosts=self.hosts),
        )
        return [rank for rank in slowest if rank]

    def _slowest_stage(self, parts: Sequence[float]) -> dict[int, float]:
        """Return rank -> seconds for the stage whose slowest rank is furthest over its median."""
        stages: dict[int, dict[int, float]] = {}
        for rank, (stage, seconds) in enumerate(zip(self.stages, parts, strict=True)):
            stages.setdefault(stage, {})[rank] = seconds
        return max(stages.values(), key=_ratio)

    def _receive_seconds(self) -> float:
        """Return the seconds until the neighbor's message arrives, from when all are ready."""
        rank = torch.distributed.get_rank()
        if self.links is None or rank not in self.leaders:
            return 0.0
        at, size = self.leaders.index(rank), len(self.leaders)
        box = torch.empty(PROBE_BYTES, dtype=torch.uint8, device="cpu")
        torch.distributed.barrier(group=self.links)
        began = time.perf_counter()
        out = torch.distributed.isend(
            torch.zeros_like(box), self.leaders[(at + 1) % size], group=self.links
        )
        torch.distributed.recv(box, self.leaders[at - 1], group=self.links)
        seconds = time.perf_counter() - began
        out.wait()
        return seconds


def _ratio(seconds: dict[int, float]) -> float:
    return max(seconds.values()) / max(statistics.median_low(seconds.values()), 1e-9)


class _Streak:
    """Tracks one measure over successive log lines."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.host, self.lines = "", 0

    def next(
        self, seconds: dict[int, float], *, step: float, hosts: Sequence[str]
    ) -> SlowRank | None:
        """Return the slowest rank once its host has been too slow in LINES lines in a row."""
        if len(seconds) < 2:
            return None
        rank = max(seconds, key=lambda rank: seconds[rank])
        median = statistics.median_low(seconds.values())
        excess = seconds[rank] - median
        is_slow = excess > max((RATIO - 1) * median, LEAST, SHARE * step)
        host = hosts[rank] if is_slow else ""
        self.lines = self.lines + 1 if host and host == self.host else int(is_slow)
        self.host = host
        return SlowRank(self.what, rank, host, _ratio(seconds)) if self.lines == LINES else None
