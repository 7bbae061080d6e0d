"""Time what replaces many operators on a GPU against what it replaces, forward and backward.

    make bench-gpu

    assignment    8,192 tokens to 32 and to 128 experts by kernels, against operators
    experts       32 of them, 1,024 -> 4,096 -> 1,024, by grouped GEMMs, against one after another
    gate          from u to y, T = 1,024, by kernels, against its parts, against the dense
                  product M v of cuBLAS alone, and against causal attention of the same width by
                  F.scaled_dot_product_attention

Shapes are those of configs/paper/regular with eight samples, in bf16. `make first-gpu` times the
same. Without a CUDA device the benchmark says so and exits.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import Record, compare, report
from torch import Tensor
from torch.nn import functional

type Call = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """Letters: T tokens, B samples, D hidden, Z width of an expert and of the gate's two halves."""

    tokens: int = 1024
    samples: int = 8
    hidden: int = 1024
    expert: int = 4096
    num_experts: tuple[int, ...] = (32, 128)
    heads: int = 16


TINY = Sizes(tokens=24, samples=2, hidden=16, expert=32, num_experts=(3, 4), heads=2)
"""For a CPU in place of a GPU."""


def pairs(sizes: Sizes, device: str) -> Iterator[tuple[str, Call, Call]]:
    """Yield each comparison's name, ours and the peer; call both before asking for the next."""
    yield from _assignments(sizes, device)
    yield from _experts(sizes, device)
    yield from _gates(sizes, device)


def _assignments(sizes: Sizes, device: str) -> Iterator[tuple[str, Call, Call]]:
    from megatron_smlp.ops.balanced_assignment import balanced_assignment
    from megatron_smlp.ops.device_assignment import device_assignment

    for count in sizes.num_experts:
        scores = torch.randn(sizes.tokens * sizes.samples, count, device=device)
        yield (
            f"balanced assignment, {len(scores)} tokens, {count} experts, against operators",
            lambda scores=scores: balanced_assignment(scores),  # type: ignore[misc]
            lambda scores=scores: device_assignment(scores),  # type: ignore[misc]
        )


def _experts(sizes: Sizes, device: str) -> Iterator[tuple[str, Call, Call]]:
    count = sizes.num_experts[0]
    n = sizes.tokens * sizes.samples
    hidden = torch.randn(n, sizes.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    counts = torch.tensor([n // count + (place < n % count) for place in range(count)])
    counts = counts.to(device)
    with one_rank(device):
        experts = build_experts(sizes, count, device)
        inputs = [hidden, *experts.parameters()]
        yield (
            f"{count} experts, grouped, against one after another",
            _with_gradients(lambda: experts.grouped(hidden, counts), inputs),
            _with_gradients(lambda: experts.one_by_one(hidden, counts), inputs),
        )


def _gates(sizes: Sizes, device: str) -> Iterator[tuple[str, Call, Call]]:
    from megatron_smlp.ops.gated_mix import gates_by_kernels, gelu_gate, gelu_gate_reference

    def drawn(*shape: int) -> Tensor:
        numbers = torch.randn(shape, device=device, dtype=torch.bfloat16)
        return numbers.requires_grad_()

    u = drawn(sizes.tokens, sizes.samples, sizes.expert)
    norm = [drawn(sizes.expert // 2) for _ in range(2)]
    weight, bias = drawn(1, sizes.tokens, sizes.tokens), drawn(1, sizes.tokens)
    inputs = [u, *norm, weight, bias]
    by_kernels = gates_by_kernels(u, 1, functional.gelu, len(u))
    gate = gelu_gate if by_kernels else gelu_gate_reference
    ours = _with_gradients(lambda: gate(u, (*norm, 1e-5), weight, bias), inputs)
    parts = _with_gradients(lambda: gelu_gate_reference(u, (*norm, 1e-5), weight, bias), inputs)
    columns = drawn(sizes.tokens, sizes.samples * sizes.expert // 2)
    dense = _with_gradients(lambda: weight[0] @ columns, [weight, columns])
    query, key, value = (
        drawn(sizes.samples, sizes.heads, sizes.tokens, sizes.hidden // sizes.heads)
        for _ in range(3)
    )
    attention = _with_gradients(
        lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True),
        [query, key, value],
    )
    yield "gate, against its parts", ours, parts
    yield "gate, against a dense product", ours, dense
    yield "gate, against scaled_dot_product_attention", ours, attention


def _with_gradients(function: Callable[[], Tensor], inputs: list[Tensor]) -> Call:
    upstream = torch.ones_like(function())

    def call() -> object:
        return torch.autograd.grad(function(), inputs, upstream)

    return call


def build_experts(sizes: Sizes, count: int, device: str) -> Any:
    from megatron.core.models.backends import get_backend
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smlp.architectures import SMLPTransformerConfig
    from megatron_smlp.layers.token_moe import token_moe_builder

    config = SMLPTransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.expert,
        num_attention_heads=sizes.heads,
        spatial_length=sizes.tokens,
        params_dtype=torch.bfloat16,
        bf16=True,
        transformer_impl="local",
        use_cpu_initialization=True,  # needs no generator of Megatron's
        gradient_accumulation_fusion=False,
        num_moe_experts=count,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_ffn_hidden_size=sizes.expert,
        moe_token_dispatcher_type="alltoall",
    )
    build = token_moe_builder(config, get_backend("local"))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build(config=config, pg_collection=groups).experts.to(device)


@contextlib.contextmanager
def one_rank(device: str) -> Iterator[None]:
    """Set up Megatron's process groups for this process alone, while a layer is built."""
    from megatron.core import parallel_state

    from megatron_smlp.platform import cpu

    cpu.apply()
    if torch.distributed.is_initialized():
        yield
        return
    backend = "nccl" if device == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def measured(sizes: Sizes, device: str, *, repeats: int) -> Iterator[Record]:
    """Yield each pair's record, timed in turns; the first calls compile and are not counted."""

    def waiting(call: Call) -> Call:
        def called() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return called

    for name, ours, peer in pairs(sizes, device):
        yield compare(name, waiting(ours), waiting(peer), repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--repeats", type=int, default=20, help="calls per case and side")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu_kernels: skipped, there is no CUDA device")
        return
    torch.manual_seed(0)
    report(list(measured(Sizes(), "cuda", repeats=arguments.repeats)), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
