"""Deferred `torch.compile`: the first call really compiles."""

from typing import Any

import torch
from torch import Tensor

from megatron_smlp.megatron_patches.late_compile import late_compile


class Backend:
    """Runs graphs as they are, and counts them."""

    compiled = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.compiled += 1
        return graph.forward


def test_the_first_call_compiles_once():
    backend = Backend()
    with late_compile():

        @torch.compile(backend=backend)
        def square(x: Tensor) -> Tensor:
            """x * x"""
            return x * x

    assert not backend.compiled
    assert square.__doc__ == "x * x"
    for _ in range(2):
        assert square(torch.tensor([3.0])).item() == 9.0
    assert backend.compiled == 1


def test_an_outer_region_takes_the_function_in():
    with late_compile():
        double = torch.compile(lambda x: 2 * x, backend="eager")
    outer = torch.compile(lambda x: double(x) + 1, backend=(backend := Backend()), fullgraph=True)
    assert outer(torch.tensor([3.0])).item() == 7.0
    assert backend.compiled == 1


def test_modules_are_compiled_as_ever_and_torch_is_put_back():
    compile_now = torch.compile
    with late_compile():
        module = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    assert type(module).__name__ == "OptimizedModule"
    assert torch.compile is compile_now
