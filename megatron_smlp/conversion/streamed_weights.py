"""Run a model whose weights are on disk: each is read when it is used, then released."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Read = Callable[[str, int | None], Tensor]
"""Returns a tensor by its name, or one row of it."""


class StreamedWeight(Tensor):
    """A placeholder for a tensor in fp32: operations on it read its values and use those.

    `weight[3]` reads only that row, so that a stack of experts is never in memory as a whole.
    """

    read: Read
    key: str

    @staticmethod
    def of(read: Read, name: str, like: Tensor) -> StreamedWeight:
        dtype = torch.float32 if like.is_floating_point() else like.dtype
        meta = torch.empty(like.shape, dtype=dtype, device="meta")
        weight: StreamedWeight = Tensor._make_subclass(StreamedWeight, meta)
        weight.read, weight.key = read, name
        return weight

    def values(self, row: int | None = None) -> Tensor:
        values = self.read(self.key, row)
        return values.float() if values.is_floating_point() else values

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in WITHOUT_VALUES:
                return func(*args, **(kwargs or {}))
            if func == Tensor.__getitem__ and isinstance(args[1], int) and args[1] >= 0:
                return args[0].values(row=args[1])
            args, kwargs = tree_map(_values, (args, kwargs or {}))
            return func(*args, **kwargs)


WITHOUT_VALUES = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.ndim.__get__,
    Tensor.requires_grad.__get__,
    Tensor.is_floating_point,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
}
"""Operations that need no values; everything else, even a weight's device, reads them."""


def _values(value: Any) -> Any:
    return value.values() if isinstance(value, StreamedWeight) else value


@contextlib.contextmanager
def weights_from(read: Read, model: nn.Module) -> Iterator[None]:
    """Replace the model's parameters and saved buffers by streamed weights, within the block.

    Args:
        read: called with a weight's name in the model; for tied weights, with the first one's.
        model: on the meta device.
    """
    first: dict[int, str] = {}
    before = []
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            tied = first.setdefault(id(value), name)
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            table = owner._parameters if leaf in owner._parameters else owner._buffers
            before.append((table, leaf, value))
            table[leaf] = StreamedWeight.of(read, tied, value)
    try:
        yield
    finally:
        for table, leaf, value in before:
            table[leaf] = value
