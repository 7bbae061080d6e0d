"""Runs `megatron.training` on a machine without CUDA, over gloo.

NVIDIA supports no CPU path, but the training loop needs a GPU only for the names that it calls.
This module, and nothing else in the project, replaces those names, giving a reason for each.
`apply()` is a no-op where CUDA is available, unless told otherwise: a conversion always runs on the
CPU. `torch.cuda.is_available` itself is never faked, because torch.compile and Megatron's own
fallbacks query it and must get the true answer.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError

CPU = torch.device("cpu")

# Flag values required on a CPU, by argparse destination. The fusions are CUDA extensions, weights
# are drawn on the CPU anyway, and there is no NCCL.
FLAGS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,  # megatron_patches/cross_entropy.py takes fewer passes
    "no_persist_layer_norm": True,
}

GPU_FLAGS = (
    *("fp16", "tp_comm_overlap", "fp8"),
    *("log_memory_to_tensorboard", "log_device_memory_used", "record_memory_history"),
)
"""Flags that request what only a GPU has."""

FACTORIES = ("empty", "empty_like", "ones", "tensor", "zeros")
"""The factories that Megatron calls with `device="cuda"` or with pinned memory."""

# The optimizer groups parameters by these strings.
CPU_TYPES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def needed() -> bool:
    """Return whether there is no CUDA device, so that `apply` must replace the names."""
    return not torch.cuda.is_available()


def active() -> bool:
    """Return whether the names below are replaced: every tensor of this process is on the CPU."""
    return getattr(torch.cuda, "_smlp_cpu_platform", False)


def apply(*, everywhere: bool = False) -> None:
    """Replace every name below, once per process.

    Args:
        everywhere: replace them even where CUDA is available.
    """
    if active() or not (everywhere or needed()):
        return
    torch.cuda._smlp_cpu_platform = True
    _replace_device_functions()
    _replace_streams()
    _replace_random_state()
    _replace_tensor_placement()
    _replace_tensor_types()
    _replace_in_megatron()


def set_flags(args: argparse.Namespace) -> None:
    """Set the flags that a CPU requires, if there is no GPU."""
    if needed():
        vars(args).update(FLAGS)


def check_flags(args: argparse.Namespace) -> None:
    """Check that no flag requests what only a GPU has.

    Raises:
        UsageError: one does; names the flag.
    """
    for flag in GPU_FLAGS:
        if needed() and getattr(args, flag, None):
            raise UsageError(
                f"{flag_of(flag)} needs a CUDA device and none was found. Leave it out"
                + (", or use --bf16." if flag in ("fp16", "fp8") else ".")
            )


def _replace_device_functions() -> None:
    """Replace queries about the device: there is one, the CPU."""
    properties = SimpleNamespace(  # TorchInductor reads more of these than Megatron
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1, warp_size=1
    )
    answers: dict[str, Any] = {
        "current_device": CPU,
        "device_count": 1,  # initialize_megatron builds process groups only for a count over 0
        "get_device_properties": properties,
        "get_device_capability": (0, 0),
        "is_current_stream_capturing": False,
        "set_device": None,
        "synchronize": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _constant(answer))


class CPUStream(torch.cpu.Stream):
    """Stand-in for `torch.cuda.Stream` on a device with one queue: order holds without waiting."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, event: Any = None) -> torch.cpu.Event:
        return event or torch.cpu.Event()


def _replace_streams() -> None:
    """Make streams and events no-ops: a CPU operation is finished when it returns."""
    stream = CPUStream()
    torch.cuda.Event = torch.cpu.Event
    torch.cuda.Stream = CPUStream
    torch.cuda.stream = contextlib.nullcontext
    torch.cuda.set_stream = _constant(None)
    torch.cuda.current_stream = _constant(stream)


def _replace_random_state() -> None:
    """Make torch's default generator, which dropout on the CPU draws from, the "device" one."""
    generator = torch.default_generator

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return generator.get_state()

    torch.cuda.default_generators = (generator,)
    torch.cuda.manual_seed = generator.manual_seed
    for module in (torch.cuda, torch.cuda.random):  # Megatron calls both names
        module.get_rng_state = get_rng_state
        module.set_rng_state = _set_rng_state


def _set_rng_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.default_generator.set_state(state)


def _replace_tensor_placement() -> None:
    """Make `device="cuda"`, `.cuda()` and `.to("cuda")` mean the CPU.

    `with torch.device(...)` affects the factories in a list that torch builds on first use. Build
    it before replacing them, or such a context would have no effect afterwards.
    """
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    def stay(self: Any, *_: Any, **__: Any) -> Any:
        return self

    torch.Tensor.cuda = stay
    torch.nn.Module.cuda = stay
    for owner in (torch.Tensor, torch.nn.Module):
        owner.to = _on_cpu(owner.to)


def _replace_tensor_types() -> None:
    """Make `Tensor.type()` without an argument return the CUDA type that the optimizer expects."""
    plain = torch.Tensor.type

    @functools.wraps(plain)
    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain(self, *args, **kwargs)
        return CPU_TYPES.get(answer, answer) if isinstance(answer, str) else answer

    torch.Tensor.type = named


def _replace_in_megatron() -> None:
    """Replace the few places in Megatron that check for CUDA or assume it."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # Without CUDA this call is queued until CUDA initializes, which is never: the random states of
    # the tensor parallel regions would be neither switched nor loaded.
    tensor_parallel_random._set_cuda_rng_state = _set_rng_state
    # Split sizes already on the CPU must still be converted to numpy, or gloo rejects them.
    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = _move_to_cpu
    # Tensor parallel ranks may send their experts different numbers of tokens: NCCL accepts parts
    # of different sizes, gloo rejects them.
    mappings._gather_along_first_dim = _gathering_parts(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reducing_parts(
        mappings._reduce_scatter_along_first_dim
    )
    # Nor can gloo all-gather what data parallel ranks update by whole layers.
    LayerWiseDistributedOptimizer.allgather_params = LayerWiseDistributedOptimizer.broadcast_params


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gathering_parts(gather: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(gather)
    def wrapped(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if output_split_sizes is None:
            return gather(input_, group, None, *args, **kwargs)
        output = input_.new_empty((sum(output_split_sizes), *input_.shape[1:]))
        for rank, part in enumerate(output.split(output_split_sizes)):
            if rank == group.rank():
                part.copy_(input_)
            torch.distributed.broadcast(part, group=group, group_src=rank)
        return output

    return wrapped


def _reducing_parts(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reduce_scatter)
    def wrapped(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if input_split_sizes is None:
            return reduce_scatter(input_, group, None, *args, **kwargs)
        parts = input_.contiguous().clone().split(input_split_sizes)
        for rank, part in enumerate(parts):
            torch.distributed.reduce(part, group=group, group_dst=rank)
        return parts[group.rank()].clone()

    return wrapped


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a factory, or `to`: CUDA devices become the CPU, and memory is never pinned."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _constant(answer: Any) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        return answer

    return function
