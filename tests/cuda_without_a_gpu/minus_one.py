"""For test_minus_one.py, in a process of its own: which functions of Megatron's a step calls.

    PYTHONPATH=tests python tests/cuda_without_a_gpu/minus_one.py FOLDER

Prints, of each name that the CPU platform would have replaced, the module whose function it is and
how often it was called.
"""

import functools
import importlib
import json
import sys
from typing import Any

from support.cuda_stand_in import install

install()

import torch  # noqa: E402
from support.cpu_replacements import MEGATRONS  # noqa: E402
from support.systems import MODEL, SYSTEMS  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from pretrain_smlp import main  # noqa: E402


def watched(calls: dict[str, int], name: str) -> str:
    """Count the calls of a function, which stays; returns its module."""
    place, _, attribute = name.rpartition(".")
    module = importlib.import_module(place)
    function = getattr(module, attribute)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    setattr(module, attribute, counted)
    return function.__module__


def exchange_parts() -> dict[str, list[int]]:
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
    calls = dict.fromkeys(sorted(MEGATRONS), 0)
    origins = {name: watched(calls, name) for name in calls}
    # Where choices may be dropped, the host reads how many are left with Megatron's own functions.
    router = "--token-router switch --moe-train-capacity-factor 1.25"
    model = SYSTEMS["smlp_partial"].replace("--token-router base", router)
    words = f"{MODEL} {model} --seq-length 64 --global-batch-size 2 --bf16"
    main([*words.split(), "--train-iters", "1", "--log-dir", sys.argv[1]])
    found = {name: [origins[name], count] for name, count in calls.items()}
    print(json.dumps({"functions": found, "parts": exchange_parts()}))
