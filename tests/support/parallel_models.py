"""Count on every rank what a model of a parallel layout keeps and sends in one micro-batch."""

from __future__ import annotations

import contextlib
import json
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# How often a rank of n sends (n - 1) / n of the whole tensor, with ring algorithms. On a CPU, a
# gather or scatter of parts of different sizes is a broadcast or reduction of each part.
RINGS = {
    "allreduce_": 2,
    "allgather_": 1,
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "broadcast_": 1,
    "reduce_": 1,
    "alltoall_base_": 1,
}


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends, by process group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0], tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, leaves: list[Any]) -> None:
        sizes = [leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor)]
        [group] = [
            torch.distributed.ProcessGroup.unbox(leaf)
            for leaf in leaves
            if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type())
        ]
        ranks = group.size()
        whole = sum(sizes[:ranks]) if name == "allgather_" else max(sizes)
        self.bytes[group.group_name] += RINGS[name] * (ranks - 1) / ranks * whole


class Kept:
    """Counts the bytes of storages that autograd keeps besides `model`'s own: now, and at peak."""

    def __init__(self, model: nn.Module) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self.own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.uses: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> _Held:
        held, storage = _Held(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.own:
            self.uses[place] += 1
            if self.uses[place] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._dropped, place, size)
        return held

    def _dropped(self, place: int, size: int) -> None:
        self.uses[place] -= 1
        if not self.uses[place]:
            self.now -= size


class _Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def kept_by(model: nn.Module) -> Iterator[Kept]:
    """Count what is kept, as on a GPU: without blockwise attention, without padded experts."""
    from megatron_smlp.layers import token_moe
    from megatron_smlp.ops import causal_attention

    kept = Kept(model)
    with (
        mock.patch.object(causal_attention, "LONGEST", 0),
        mock.patch.object(token_moe, "ROWS", 1),
        torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor),
    ):
        yield kept


def measure(cases: Mapping[str, str], folder: str) -> None:
    """Train one micro-batch of each case, name -> flags, and write this rank's numbers: the peak
    bytes that autograd keeps, and the bytes sent in the tensor parallel group and in others."""
    from megatron.core import parallel_state
    from support.in_process import prepare_megatron

    prepare_megatron()
    torch.distributed.init_process_group("gloo")
    found = {name: _measured(flags) for name, flags in cases.items()}
    parallel_state.destroy_model_parallel()
    path = Path(folder) / f"rank-{torch.distributed.get_rank()}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _measured(flags: str) -> dict[str, float]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from support.in_process import MINIMAL, base_for, build_model, forget_arguments

    from megatron_smlp.flags.parse import parse_arguments

    forget_arguments()
    args = parse_arguments([*base_for(flags, MINIMAL).split(), *flags.split()])
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(1)
    model = build_model(args).train().to(args.params_dtype)
    ids = torch.randint(args.padded_vocab_size, (args.micro_batch_size, args.seq_length))
    places = torch.arange(args.seq_length).expand_as(ids)
    with kept_by(model) as kept, Sent() as sent:
        model(ids, places, None, labels=ids).mean().backward()
    group = parallel_state.get_tensor_model_parallel_group().group_name
    return {
        "kept": kept.peak,
        "tensor": sent.bytes.pop(group, 0.0),
        "expert": math.fsum(sent.bytes.values()),
    }
