"""Runs a model whose weights are on the `meta` device: each layer has its own while it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Reader(Protocol):
    def read(self, name: str) -> Tensor: ...


@contextlib.contextmanager
def weights_from(
    reader: Reader, model: nn.Module, layers: Iterable[nn.Module], *, prefix: str
) -> Iterator[None]:
    """Give the model its weights: those of a layer while it runs, all others for the time of this.

    Args:
        reader: gives a weight by the name that it has in the model.
        layers: the modules of which only one is to be in memory, called `prefix`.0, `prefix`.1, ...
    """
    layers = list(layers)
    names = {id(layer): f"{prefix}.{number}" for number, layer in enumerate(layers)}
    outside = [n for n in _tied_names(model) if not n[0].startswith(f"{prefix}.")]
    hooks = []
    try:
        _fill(model, outside, reader)
        for layer in layers:
            hooks += _hooks(layer, names[id(layer)], reader)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _empty(model, outside)


def _hooks(layer: nn.Module, name: str, reader: Reader) -> list[Any]:
    own = _tied_names(layer)

    def before(*_: Any) -> None:
        _fill(layer, own, reader, prefix=f"{name}.")

    def after(*_: Any) -> None:
        _empty(layer, own)

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]


def _tied_names(module: nn.Module) -> list[list[str]]:
    """Names of parameters and saved buffers; those of one tensor together."""
    groups: dict[int, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            groups.setdefault(id(value), []).append(name)
    return list(groups.values())


def _fill(module: nn.Module, groups: list[list[str]], reader: Reader, *, prefix: str = "") -> None:
    for names in groups:
        value = reader.read(prefix + names[0])
        value = value.float() if value.is_floating_point() else value
        for name in names:
            _set(module, name, value)


def _empty(module: nn.Module, groups: list[list[str]]) -> None:
    for names in groups:
        value = _get(module, names[0])
        if value.is_meta:
            continue
        empty = torch.empty_like(value, device="meta")
        for name in names:
            _set(module, name, empty)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _get(module: nn.Module, name: str) -> Tensor:
    owner, leaf = _owner(module, name)
    value: Tensor = getattr(owner, leaf)
    return value


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, leaf = _owner(module, name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
