"""Compiles Megatron's fused cross entropy for GPUs that need not be there, as Inductor would there.

    python tests/support/compiled_loss.py kernels.json

Each of its four functions is traced with tensors of an H100 that hold no numbers, Inductor writes
Triton kernels of it, and Triton and ptxas compile these. Of each function: the bytes that kernels
read and write of a logit; of each kernel: registers and stack of a thread, by compute capability.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import triton  # noqa: E402
from megatron.core.fusions import fused_cross_entropy as megatrons  # noqa: E402
from support.compiled_kernels import CAPABILITIES, resources  # noqa: E402
from support.hopper import HOPPER  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._functorch.aot_autograd import aot_function  # noqa: E402
from torch._inductor import compile_fx  # noqa: E402
from torch._inductor.debug import DebugContext  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.runtime import triton_helpers, triton_heuristics  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOKENS, VOCABULARY = (1024, 8), 50304
SIZES = {"*fp32": 4, "*bf16": 2, "*i1": 1, "*i64": 8}
POINTWISE, REDUCTION = {"XBLOCK": 1024}, {"XBLOCK": 1, "R0_BLOCK": 2048}
"""Blocks of the size that Inductor tries first."""
ANSWERS: dict[str, Any] = {
    "is_available": True,
    "get_device_properties": HOPPER,
    "get_device_capability": (9, 0),
    "get_compute_capability": 90,
    "current_device": 0,
    "device_count": 1,
    "is_bf16_supported": True,
    "is_triton_capable": True,
}


class Function(NamedTuple):
    """A compiled function of Megatron's, and what the loss hands it."""

    call: Callable[..., Any]
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]


def _predicted(logits: Any, target: Any, largest: Any) -> Any:
    return _plain(megatrons.calculate_predicted_logits)(logits, target, largest, 0, VOCABULARY)


def _plain(function: Any) -> Callable[..., Any]:
    return getattr(function, "_torchdynamo_orig_callable", function)


LOGITS, NUMBER = (*TOKENS, VOCABULARY), torch.float32
FUNCTIONS = {
    "largest logit": Function(_plain(megatrons.calculate_logits_max), ((LOGITS, torch.bfloat16),)),
    "predicted logit": Function(
        _predicted, ((LOGITS, NUMBER), (TOKENS, torch.int64), (TOKENS, NUMBER))
    ),
    "loss": Function(
        _plain(megatrons.calculate_cross_entropy_loss),
        ((LOGITS, NUMBER), ((2 * TOKENS[0], TOKENS[1]), NUMBER)),
    ),
    "gradient": Function(
        _plain(megatrons.calculate_gradients),
        (
            (LOGITS, NUMBER),
            (TOKENS, NUMBER),
            (TOKENS, torch.bool),
            ((TOKENS[0] * TOKENS[1],), torch.int64),
        ),
    ),
}


@contextlib.contextmanager
def _hopper() -> Iterator[None]:
    """Answer for a device, and let Triton compile for one that is not there."""
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
    )
    triton.runtime.driver.set_active(driver)
    with contextlib.ExitStack() as patches:
        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            for name, answer in ANSWERS.items():
                if hasattr(owner, name):
                    reply = staticmethod(lambda *_, _answer=answer, **__: _answer)
                    patches.enter_context(mock.patch.object(owner, name, reply))
        yield


def sources(function: Function) -> Iterator[str]:
    """Yield the Triton kernels that Inductor makes of a function, as texts of modules."""
    mode, written = FakeTensorMode(), []

    def lowered(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        with _hopper(), V.set_fake_mode(mode), DebugContext():
            compile_fx._recursive_post_grad_passes(graph, is_inference=True)
            lowering = GraphLowering(graph, example_inputs=inputs, is_inference=True)
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
                lowering.run(*inputs)
                written.append(lowering.codegen()[0].value)
        return graph

    with mode, torch.no_grad():
        inputs = [torch.empty(size, dtype=kind, device="cuda") for size, kind in function.inputs]
        aot_function(
            function.call,
            fw_compiler=lowered,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )(*inputs)
    (wrapper,) = written
    yield from re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", wrapper, re.DOTALL)


def compiled(source: str) -> dict[str, Any]:
    """Compile a kernel for each capability: registers and stack of a thread."""
    kernels: list[tuple[Any, dict[str, Any]]] = []

    def kept(**described: Any) -> Callable[[Any], Any]:
        return lambda kernel: kernels.append((kernel, described["triton_meta"]))

    with contextlib.ExitStack() as patches:
        for name in ("pointwise", "reduction", "persistent_reduction"):
            patches.enter_context(mock.patch.object(triton_heuristics, name, kept))
        patches.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        name = f"{__file__}.{abs(hash(source))}"  # Triton reads a kernel's text from its file
        exec(_with_lines(source, name), {"__file__": name})
    ((kernel, described),) = kernels
    signature = described["signature"]
    constants = REDUCTION if "R0_BLOCK" in signature else POINTWISE
    used = {}
    for capability in CAPABILITIES:
        made = ASTSource(
            fn=kernel, signature=signature, constexprs=constants, attrs=described["configs"][0]
        )
        target = GPUTarget("cuda", capability, 32)
        binary = triton.compile(made, target=target, options={"num_warps": 8})
        used[str(capability)] = resources(binary.asm["cubin"])
    return used


def _with_lines(source: str, name: str) -> Any:
    import linecache

    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return compile(source, name, "exec")


def bytes_of_a_logit(source: str) -> int:
    """Return what a kernel reads and writes of each logit; nothing, where it is one of tokens."""
    pointers = dict(re.findall(r"'(\w+)': '(\*\w+)'", source))
    covers_all = f"xnumel = {TOKENS[0] * TOKENS[1] * VOCABULARY}\n" in source
    moved = 0
    for pointer, place in re.findall(r"tl\.(?:load|store)\((\w+) \+ \((.*?)\), ", source):
        if "r0_1" in place or (covers_all and place in ("x0", "x2")):
            moved += SIZES[pointers[pointer]]
    return moved


if __name__ == "__main__":
    table = {}
    for title, function in FUNCTIONS.items():
        texts = list(sources(function))
        moved = sum(bytes_of_a_logit(text) for text in texts)
        table[title] = {"bytes of a logit": moved, "kernels": [compiled(text) for text in texts]}
    Path(sys.argv[1]).write_text(json.dumps(table, indent=1), encoding="utf-8")
