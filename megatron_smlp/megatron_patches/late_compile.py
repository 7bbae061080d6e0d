"""Defers `torch.compile` to a function's first call, while Megatron is being imported.

Megatron decorates its fused functions with `torch.compile` where they are defined. The decorator
alone imports TorchDynamo and Inductor, a third of Megatron's import time, yet most runs call none
of these functions (on a CPU the fusions are off, and only a router's expert bias remains).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_smlp.megatron_patches.wrapping import wrapped_in


@contextlib.contextmanager
def late_compile() -> Iterator[None]:
    """Defer functions decorated in this block to the real `torch.compile` at their first call.

    Anything but a plain function (a module, a class) is compiled at once as usual; a call inside an
    outer compiled region is traced with that region.
    """
    compile_now: Callable[..., Any] = torch.compile

    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **options)
        if not inspect.isfunction(model):
            return compile_now(model, **options)
        return _compiled_by_first_call(model, functools.partial(compile_now, model, **options))

    with wrapped_in((torch, "compile", lambda _: compile_later)):
        yield


def _compiled_by_first_call(function: Callable[..., Any], compile_now: Callable[[], Any]) -> Any:
    compiled = functools.cache(compile_now)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)  # the outer region compiles it with the rest
        return compiled()(*args, **kwargs)

    return call
