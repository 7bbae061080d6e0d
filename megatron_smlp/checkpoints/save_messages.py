"""What a run says of a save that failed: whose error it was, and what is left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints.folders import latest_iteration

CUT_SHORT = "was written in part only, as on a full disk"


def left_in(run: Path) -> str:
    left = latest_iteration(run)
    if left is None:
        return "no checkpoint is there yet"
    return f"the newest there is of iteration {left}"


def text_of(error: OSError) -> str:
    """`/run/.iter_0000010.partial-4f1c/__0_0.distcp: No space left on device`"""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def reason_of(error: BaseException, hosts: Sequence[str] = ()) -> str:
    """Return the innermost message of an error that torch and Megatron wrap several times.

    Args:
        hosts: of each rank, to name the one that failed.
    """
    failures: dict[int, Any] = getattr(error, "failures", None) or {}
    rank, inner = next(
        ((rank, str(failure[0])) for rank, failure in failures.items()), (None, str(error))
    )
    owner = "" if rank is None else whose(rank, hosts)
    text = re.split(r"error: ", " ".join(inner.split()))[-1][:300]
    # Torch's archives compare positions instead of asking the system, as on a full disk.
    return re.sub(r"\[enforce fail at inline_container.*", CUT_SHORT, text) + owner


def whose(rank: int, hosts: Sequence[str]) -> str:
    return f" (rank {rank} on {hosts[rank]})" if hosts else ""
