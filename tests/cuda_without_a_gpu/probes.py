"""For test_probes.py, in a process of its own, where the CPU stands in for a CUDA device: as JSON,

* how often the host waits for the device, and what a capture refuses of that;
* which layers a CUDA graph could hold: in a training step of each system, each layer's forward and
  backward pass run once more, where nothing is permitted that a capture refuses;
* whose function is in the place of each of Megatron's that the CPU platform would have replaced,
  and how often a step calls it.
"""

from __future__ import annotations

import functools
import json
import pkgutil
import tempfile
from collections.abc import Callable
from typing import Any

from support.cuda_stand_in import capturing, install, watch

install()

import torch  # noqa: E402 - behind the device
from support.cpu_replacements import MEGATRONS  # noqa: E402
from support.runs import forget_run  # noqa: E402
from support.systems import MODEL, SYSTEMS  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megatron_smlp.architectures import SlottedLayer  # noqa: E402
from pretrain_smlp import main  # noqa: E402


def train_a_step(flags: str) -> None:
    run = "--seq-length 64 --global-batch-size 2 --train-iters 1 --bf16 --no-resume"
    with tempfile.TemporaryDirectory() as folder:
        main([*MODEL.split(), *flags.split(), *run.split(), "--log-dir", folder])


def fetched(*, reads_first: bool) -> None:
    """A copy to the host that is waited for by an event, behind another read or not."""
    numbers = torch.ones(3, device="cuda")
    copy, event = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    if reads_first:
        numbers.sum().item()
    event.synchronize()
    copy.tolist()


def refused(work: Callable[[], object]) -> str | None:
    """What a capture says of this work."""
    try:
        with capturing():
            work()
    except RuntimeError as error:
        return str(error)
    return None


def waits() -> dict[str, tuple[int, bool]]:
    """Of each operation, how often the host waits for it, and whether a capture refuses it."""
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
    counts = {}
    for name, work in cases.items():
        with watch() as tally:
            work()
        counts[name] = (sum(tally.synchronisations.values()), refused(work) is not None)
    return counts


def captures(flags: str) -> dict[str, dict[str, Any]]:
    """By kind of layer: whether it routes, and what a capture refuses of it."""
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


def megatrons_functions() -> dict[str, list[Any]]:
    """Name -> the module whose function it is, and how often a step has called it."""
    called = dict.fromkeys(sorted(MEGATRONS), 0)
    origins = {name: watched(called, name) for name in called}
    # Where choices may be dropped, the host reads how many are left with Megatron's own functions.
    router = "--token-router switch --moe-train-capacity-factor 1.25"
    muon = "--optimizer muon --use-distributed-optimizer"
    train_a_step(f"{SYSTEMS['smlp_partial'].replace('--token-router base', router)} {muon}")
    return {name: [origins[name], count] for name, count in called.items()}


def watched(called: dict[str, int], name: str) -> str:
    """Count the calls of a function, which stays; returns its module."""
    place, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(place)
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        called[name] += 1
        return function(*args, **kwargs)

    setattr(owner, attribute, counted)
    return function.__module__


def exchanged_parts() -> dict[str, list[int]]:
    """Sizes that Megatron asks the ranks to exchange: unlike ones, which gloo would refuse."""
    from megatron.core.tensor_parallel import mappings

    begin = torch.distributed.init_process_group.__wrapped__
    torch.distributed.destroy_process_group()
    begin("fake", rank=0, world_size=2, store=FakeStore())
    asked: dict[str, list[int]] = {}

    def gather(parts: list[torch.Tensor], own: torch.Tensor, group: Any) -> None:
        asked["all_gather"] = [len(own), *map(len, parts)]

    def scatter(own: torch.Tensor, parts: list[torch.Tensor], group: Any) -> None:
        asked["reduce_scatter"] = [len(own), *map(len, parts)]

    torch.distributed.all_gather, torch.distributed.reduce_scatter = gather, scatter
    group = torch.distributed.group.WORLD
    whole = mappings._gather_along_first_dim(torch.ones(3, 2, device="cuda"), group, [3, 5])
    mappings._reduce_scatter_along_first_dim(whole, group, [3, 5])
    return asked


if __name__ == "__main__":
    said = {"waits": waits(), "captures": {name: captures(SYSTEMS[name]) for name in SYSTEMS}}
    print(json.dumps(said | {"functions": megatrons_functions(), "parts": exchanged_parts()}))
