"""Print as JSON which layers a CUDA graph could hold, for test_probes.py, in a separate process
where the CPU stands in for a CUDA device. In a training step of each system, each layer's forward
and backward pass run once more, with everything forbidden that a capture refuses.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from typing import Any

from support.cuda_stand_in import capturing, install

install()

import torch  # noqa: E402 - behind the device
from support.runs import forget_run  # noqa: E402
from support.systems import MODEL, SYSTEMS  # noqa: E402

from megatron_smlp.architectures import SlottedLayer  # noqa: E402
from pretrain_smlp import main  # noqa: E402


def train_a_step(flags: str) -> None:
    run = "--seq-length 64 --global-batch-size 2 --train-iters 1 --bf16 --no-resume"
    with tempfile.TemporaryDirectory() as folder:
        main([*MODEL.split(), *flags.split(), *run.split(), "--log-dir", folder])


def refused(work: Callable[[], object]) -> str | None:
    """Return why a capture refuses this work; None if it does not."""
    try:
        with capturing():
            work()
    except RuntimeError as error:
        return str(error)
    return None


def captures(flags: str) -> dict[str, dict[str, Any]]:
    """Return by kind of layer whether it routes, and what a capture refuses of it."""
    found: dict[str, dict[str, Any]] = {}
    forward = SlottedLayer.forward

    @functools.wraps(forward)
    def twice(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def passes() -> None:
            hidden = hidden_states.detach().requires_grad_()
            output = forward(self, hidden, *args, **kwargs)[0]
            inputs, upstream = [hidden, *self.parameters()], torch.ones_like(output)
            torch.autograd.grad(output, inputs, upstream, allow_unused=True)

        kind = f"{type(self.self_attention).__name__} + {type(self.mlp).__name__}"
        if kind not in found and hidden_states.requires_grad:
            found[kind] = {"routes": self.routes, "refused": refused(passes)}
        return forward(self, hidden_states, *args, **kwargs)

    SlottedLayer.forward = twice
    try:
        train_a_step(flags)
    finally:
        SlottedLayer.forward = forward
        forget_run()
    return found


if __name__ == "__main__":
    print(json.dumps({name: captures(SYSTEMS[name]) for name in SYSTEMS}))
