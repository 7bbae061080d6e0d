"""Triton's interpreter: kernels run on the CPU, with real values, in a process of their own.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process either interprets or
compiles. `interpreted(...)` passes calls to one that interprets, and returns their results.
"""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.launches import REPOSITORY, run_command
from torch.utils._python_dispatch import _disable_current_modes

Call = tuple[str, tuple[Any, ...]]
"""`module:function` and its arguments."""


def interpreted(calls: Sequence[Call]) -> list[Any]:
    """Call each function in a process that interprets kernels."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "calls.pt", Path(folder) / "answers.pt"
        torch.save(list(calls), asked)
        run_command(
            [sys.executable, "-W", "ignore", __file__, str(asked), str(answered)],
            TRITON_INTERPRET="1",
            CUDA_VISIBLE_DEVICES="",
            PYTHONPATH=f"{REPOSITORY / 'tests'}:{REPOSITORY}",
        )
        answers: list[Any] = torch.load(answered, weights_only=False)
        return answers


class _Nothing:
    def restore(self) -> None: ...


@functools.cache
def quick_interpreter(on_launch: Callable[[str, Any], None] | None = None) -> None:
    """Prepare Triton's language once per launch, not again for each function that it calls.

    Also compute bf16 as a GPU does: Triton 3.9's interpreter multiplies matrices' bit patterns as
    integers, and truncates fp32 instead of rounding it.

    Args:
        on_launch: called with the kernel's name and its arguments.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[int] = set()

    def once(function: Any) -> Any:
        key = id(function.__globals__)
        if key in prepared:
            return _Nothing()
        prepared.add(key)
        return prepare(function)

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        if on_launch is not None:
            on_launch(self.fn.__name__, (*args, *kwargs.values()))
        # The interpreter's own memory operations are not a device's work.
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched
    multiply = interpreter.InterpreterBuilder.create_dot

    def dot(self: Any, left: Any, right: Any, *others: Any) -> Any:
        return multiply(self, _widened(left), _widened(right), *others)

    interpreter.InterpreterBuilder.create_dot = dot
    truncate = interpreter.InterpreterBuilder.create_fp_trunc

    def rounded(self: Any, handle: Any, kind: Any) -> Any:
        is_cut = handle.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16
        return _rounded(handle) if is_cut else truncate(self, handle, kind)

    interpreter.InterpreterBuilder.create_fp_trunc = rounded


def _widened(handle: Any) -> Any:
    """Convert bf16 to fp32."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle: Any) -> Any:
    """Round fp32 to the nearest bf16."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    nearest = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16()
    return TensorHandle(nearest.view(torch.uint16).numpy(), tl.bfloat16)


def _answer(call: Call) -> Any:
    name, arguments = call
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(*arguments)


if __name__ == "__main__":
    quick_interpreter()
    calls = torch.load(sys.argv[1], weights_only=False)
    torch.save([_answer(call) for call in calls], sys.argv[2])
