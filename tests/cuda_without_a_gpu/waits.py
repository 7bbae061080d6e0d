"""How often the host waits for a device that the CPU stands in for, as JSON; see test_waits.py."""

from __future__ import annotations

import json
from collections.abc import Callable

from support.cuda_stand_in import capturing, install, watch

install()

import torch  # noqa: E402 - behind the device


def fetched(*, reads_first: bool) -> None:
    """A copy to the host that is waited for by an event, behind another read or not."""
    numbers = torch.ones(3, device="cuda")
    copy, event = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    if reads_first:
        numbers.sum().item()
    event.synchronize()
    copy.tolist()


def refused(work: Callable[[], object]) -> bool:
    try:
        with capturing():
            work()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    held, other = torch.ones(3, device="cuda"), torch.ones(3)
    cases: dict[str, Callable[[], object]] = {
        "filled": lambda: torch.full((2,), 1.0, device="cuda"),
        "sent": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "sent and not waited for": lambda: other.to("cuda", non_blocking=True),
        "moved": lambda: other.cuda(),
        "copied into": lambda: held.copy_(other),
        "copied into and not waited for": lambda: held.copy_(other, non_blocking=True),
        "read": lambda: held[0].item(),
        "read one by one": lambda: torch.tensor([held[0], held[1], held[2]]),
        "computed": lambda: held * 2 + held.sum(),
        "fetched": lambda: fetched(reads_first=False),
        "fetched behind a read": lambda: fetched(reads_first=True),
    }
    waits, cannot_be_captured = {}, []
    for name, work in cases.items():
        with watch() as tally:
            work()
        waits[name] = sum(tally.synchronisations.values())
        if refused(work):
            cannot_be_captured.append(name)
    print(json.dumps({"waits": waits, "refused": cannot_be_captured}))
