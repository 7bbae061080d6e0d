"""Tensors on disk: their shape and dtype, known before they are read, and where to read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_smlp.progress import Progress

GIGABYTE = 1e9


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def on_meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def main_dtype(specs: Mapping[str, Spec]) -> torch.dtype:
    """Return the dtype of most floating-point tensors."""
    floats = [spec.dtype for spec in specs.values() if spec.dtype.is_floating_point]
    return max(set(floats), key=floats.count)


class Source(Protocol):
    """Reads tensors, one at a time."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Return a tensor, or one row of it, `[E, X, D]` -> `[X, D]`; the caller may change it."""
        ...


def tensors_of(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors to be written, one at a time, in the source's order, and show the progress.

    The bytes of each count as written when the next one is requested.
    """
    total, done = sum(spec.nbytes for spec in source.specs.values()), 0
    with Progress(total) as progress:
        for name, spec in source.specs.items():
            yield name, source.read(name)
            done += spec.nbytes
            progress.show(done, f"{done / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB written")
