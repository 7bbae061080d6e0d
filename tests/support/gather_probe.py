"""Find parameters that are read before Megatron has waited for their all-gather.

With --overlap-param-gather the distributed optimizer's ranks all-gather parameters during the
forward pass; a pre-forward hook of each module waits for those of the module. A parameter that is
read without a call of its module may silently be read half written. The probe inspects every
operator of a forward pass: where it reads a parameter, the parameter's bucket must have been
gathered and waited for.
"""

from __future__ import annotations

import bisect
import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Probe(TorchDispatchMode):
    """Args:
    ddp: a model chunk, wrapped in Megatron's data parallel class.
    """

    def __init__(self, ddp: Any) -> None:
        super().__init__()
        self.ddp = ddp
        # Per buffer: the offsets at which its parameters start, and the parameters.
        self.buffers: dict[int, tuple[list[int], list[Any]]] = {}
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
            places = sorted((place[0], name) for name, place in _numbered(buffer))
            parameters = list(buffer.param_index_map)
            self.buffers[buffer.param_data.untyped_storage()._cdata] = (
                [start for start, _ in places],
                [parameters[number] for _, number in places],
            )
        self.names = {parameter: name for name, parameter in ddp.module.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooked = self.ddp.remove_forward_pre_hook_handles
        if hooked and not func.is_view and func.namespace != "c10d":
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.numel():
                    self._check(value, func)
        return func(*args, **(kwargs or {}))

    def _check(self, value: torch.Tensor, func: Any) -> None:
        starts, parameters = self.buffers.get(value.untyped_storage()._cdata, ([], []))
        if not starts:
            return
        parameter = parameters[bisect.bisect_right(starts, value.storage_offset()) - 1]
        group = self.ddp.param_to_bucket_group[parameter]
        if not group.param_gather_dispatched or group.param_gather_handle is not None:
            raise AssertionError(
                f"{self.names[parameter]} is read by {func} before its gather was waited for"
            )
        reads[self.names[parameter]] = reads.get(self.names[parameter], 0) + 1


reads: dict[str, int] = {}
"""How often each parameter was read after its gather."""


def _numbered(buffer: Any) -> list[tuple[int, tuple[int, int, int]]]:
    return list(enumerate(buffer.param_index_map.values()))


def assert_that_it_looked() -> None:
    """Check after a run that the probe saw parameters: else it would find none read too early."""
    assert reads, "no parameter was read while gathers were under way"
    reads.clear()


def install() -> None:
    """Probe every forward pass of a model that Megatron's data parallel class wraps."""
    from megatron.core.distributed import DistributedDataParallel

    forward = DistributedDataParallel.forward

    @functools.wraps(forward)
    def probed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.ddp_config.overlap_param_gather:
            return forward(self, *args, **kwargs)
        with _Probe(self):
            return forward(self, *args, **kwargs)

    DistributedDataParallel.forward = probed
