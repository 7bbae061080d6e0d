"""Which layers a CUDA graph could hold, as JSON; see test_graph_capture.py.

In a training step of each system on the CPU that stands in for a device, each layer's forward and
backward pass run once more, where nothing is permitted that a capture refuses.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from typing import Any

from support.cuda_stand_in import capturing, install

install()

import torch  # noqa: E402 - behind the device


def captures(flags: str) -> dict[str, dict[str, Any]]:
    """By kind of layer: whether it routes, and what a capture refuses of it."""
    from support.runs import forget_run
    from support.systems import MODEL

    from megatron_smlp.architectures import SlottedLayer
    from pretrain_smlp import main

    found: dict[str, dict[str, Any]] = {}
    forward = SlottedLayer.forward

    @functools.wraps(forward)
    def twice(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = f"{type(self.self_attention).__name__} + {type(self.mlp).__name__}"
        if kind not in found and hidden_states.requires_grad:
            found[kind] = {"routes": self.routes, "refused": None}
            hidden = hidden_states.detach().requires_grad_()
            inputs = [hidden, *self.parameters()]
            try:
                with capturing():
                    output = forward(self, hidden, *args, **kwargs)[0]
                    upstream = torch.ones_like(output)
                    torch.autograd.grad(output, inputs, upstream, allow_unused=True)
            except RuntimeError as error:
                found[kind]["refused"] = str(error)
        return forward(self, hidden_states, *args, **kwargs)

    SlottedLayer.forward = twice
    run = "--seq-length 64 --global-batch-size 2 --train-iters 1 --bf16 --no-resume"
    try:
        with tempfile.TemporaryDirectory() as folder:
            main([*MODEL.split(), *flags.split(), *run.split(), "--log-dir", folder])
    finally:
        SlottedLayer.forward = forward
        forget_run()
    return found


if __name__ == "__main__":
    from support.systems import SYSTEMS

    asked = sys.argv[1:] or SYSTEMS
    print(json.dumps({system: captures(SYSTEMS[system]) for system in asked}))
