"""Print as JSON what kernels ask of a CUDA device that the CPU stands in for.

Run in a process of its own: Triton interprets, and the device is there until its end.
"""

from __future__ import annotations

import json
from typing import Any

from support.cuda_stand_in import install, launched, watch
from support.interpreted import quick_interpreter

install()
quick_interpreter(launched)

import torch  # noqa: E402 - behind the device


def assignment() -> dict[str, Any]:
    from megatron_smlp.ops.balanced_assignment import priced_assignment

    scores = torch.randn(96, 8, device="cuda")
    with watch() as tally:
        experts, prices = priced_assignment(scores)
    counts = experts.cpu().bincount(minlength=8).tolist()
    return _record(tally) | {"counts": counts, "on": [str(experts.device), str(prices.device)]}


def _record(tally: Any) -> dict[str, Any]:
    return {
        "operators": sum(tally.operators.values()),
        "launches": sum(n for name, n in tally.operators.items() if name.startswith("triton::")),
        "synchronisations": dict(tally.synchronisations),
        "bytes": tally.bytes,
    }


if __name__ == "__main__":
    print(json.dumps({"assignment": assignment()}))
