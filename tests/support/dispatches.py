"""Compare both dispatchers of one token MoE layer on every rank of a layout, for several loads.

    python tests/support/dispatches.py FOLDER LAYOUT [LAYOUT ...]

runs `compare` with the CPU standing in for a CUDA device, set up before Megatron is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DISPATCHERS = ("megatron", "sorted")
METHODS = ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess")
METHODS += ("combine_preprocess", "token_combine", "combine_postprocess")
TOKENS, EXPERTS = (6, 4), 8  # [T, B]

LOADS: dict[str, Callable[[Any, int], Any]] = {
    "uneven": lambda draws, _: (draws.square() * EXPERTS).long(),
    "one expert": lambda draws, _: (draws * 0 + 2).long(),
    "last experts": lambda draws, _: (draws * 2).long() + EXPERTS - 2,
    "rank by rank": lambda draws, rank: (draws * 0).long() + (3 * rank + 1) % EXPERTS,
}
LAYOUTS = {  # processes; tensor, expert and expert tensor parallel size
    "ep2": (2, 1, 2, 1),
    "ep4": (4, 1, 4, 1),
    "tp2_ep4": (4, 2, 4, 1),
    "tp2_ep2_split_experts": (4, 2, 2, 2),
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"bf16": True},
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "shared": {"moe_shared_expert_intermediate_size": 32},
}


def compare(folder: str, layout: str) -> None:
    """Write, for each case and load of this rank, whether output and gradients are bitwise equal,
    and what each dispatcher asks of the device: operators, and waits of the host."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from support.in_process import prepare_megatron

    prepare_megatron()
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    _, tensor, expert, expert_tensor = LAYOUTS[layout]
    parallel_state.initialize_model_parallel(
        tensor, expert_model_parallel_size=expert, expert_tensor_parallel_size=expert_tensor
    )
    model_parallel_cuda_manual_seed(1)
    sizes = {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": expert_tensor,
    }
    answers = {
        f"{case}, {load}": _compared(sizes | changes, load)
        for case, changes in CASES.items()
        for load in LOADS
    }
    rank = torch.distributed.get_rank()
    Path(folder, f"{layout}-{rank}.json").write_text(json.dumps(answers), encoding="utf-8")
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _compared(changes: dict[str, Any], load: str) -> dict[str, Any]:
    import torch

    layers = {name: _layer(changes | {"token_dispatch": name}, load) for name in DISPATCHERS}
    layers["sorted"].load_state_dict(layers["megatron"].state_dict())
    torch.manual_seed(torch.distributed.get_rank())
    dtype = torch.bfloat16 if "bf16" in changes else torch.float32
    hidden, direction = torch.randn(2, *TOKENS, layers["sorted"].config.hidden_size).to(dtype)
    answers, asked = [], {}
    for name, layer in layers.items():
        inputs = [hidden.cuda().requires_grad_(), *layer.parameters()]
        output, asked[name] = _counted(layer, inputs[0])
        output.backward(direction.cuda())
        answers.append([output, *(tensor.grad for tensor in inputs)])
    return {
        "kind": type(layers["sorted"].token_dispatcher).__name__,
        "same": all(torch.equal(*pair) for pair in zip(*answers, strict=True)),
        "norms": [float(tensor.float().norm()) for tensor in answers[0][:3]],
        **asked,
    }


def _layer(changes: dict[str, Any], load: str) -> Any:
    import torch
    from megatron.core.models.backends import get_backend
    from megatron.core.process_groups_config import ProcessGroupCollection
    from support.in_process import layer_config

    from megatron_smlp.layers.token_moe import token_moe_builder

    values: dict[str, Any] = {
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_ffn_hidden_size": 96,
        "params_dtype": torch.bfloat16 if "bf16" in changes else torch.float32,
    }
    torch.manual_seed(0)
    config = layer_config(**(values | changes))
    router = partial(_to_the_load(), load=LOADS[load])
    build = token_moe_builder(config, get_backend("local"), router=router)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build(config=config, pg_collection=groups).cuda().train()


def _to_the_load() -> Any:
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    class ToTheLoad(TopKRouter):
        """A router with prescribed choices, whose weights have a gradient."""

        def __init__(self, *, load: Callable[[Any, int], Any], **kwargs: Any) -> None:
            super().__init__(**kwargs)
            rank = torch.distributed.get_rank()
            drawn_by = torch.Generator().manual_seed(rank)
            draws = torch.rand(TOKENS[0] * TOKENS[1], generator=drawn_by)
            self.experts = load(draws, rank).cuda()

        def forward(self, input: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            weights = self.gating(input).flatten(0, 1).float().sigmoid()
            chosen = torch.nn.functional.one_hot(self.experts, EXPERTS).bool()
            return weights * chosen, chosen

    return ToTheLoad


def _counted(layer: Any, hidden: Any) -> tuple[Any, list[int]]:
    """Return the output, and the operators and host waits of the forward pass's dispatch."""
    from support.cuda_stand_in import watch

    counts = [0, 0]

    def counting(method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            with watch() as tally:
                answer = method(*args)
            counts[0] += sum(tally.operators.values())
            counts[1] += sum(tally.synchronisations.values())
            return answer

        return counted

    dispatcher = layer.token_dispatcher
    for name in METHODS:
        setattr(dispatcher, name, counting(getattr(dispatcher, name)))
    output, _ = layer(hidden)
    for name in METHODS:
        delattr(dispatcher, name)
    return output, counts


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    from support.ranks import run_ranks_on_the_stand_in

    folder, *layouts = sys.argv[1:]
    run_ranks_on_the_stand_in(
        compare,
        [
            (LAYOUTS[layout][0], (folder, layout), Path(folder, f"{layout}.log"))
            for layout in layouts
        ],
    )
