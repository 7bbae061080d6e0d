"""Compile the Triton kernels for GPUs that need not be present, and read their resource usage.

    python tests/support/compiled_kernels.py benchmarks/results/kernels.json

Each kernel is compiled as the models' sizes require: bf16 or fp32 operands whose addresses and
strides are divisible by 16. Reads registers and stack bytes per thread (registers spill to the
stack), shared memory per program, and the matrix multiply instructions: counts from the compiler,
the same on every machine with the same Triton.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from megatron_smlp.ops import tiles  # noqa: E402
from megatron_smlp.ops.tiles import Tile  # noqa: E402
from megatron_smlp.ops.triton_ready import FUSED  # noqa: E402

CAPABILITIES = (80, 89, 90, 100, 120)
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory available to a program, from NVIDIA's tables of compute capabilities."""
INSTRUCTIONS = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
ASSIGNMENT = {"W": 64, "BLOCK": 64, "P": 32, "DAMPING": 0.01, "MAX_STEP": 2.0, "SOLVER_STEPS": 16}
ASSIGNMENT |= {"SMALLEST_GAIN": 1e-5}
GATE = {"WIDTH": 128, "HAS_ADDED": False}
LINES = GATE | {"ROWS": 32, "COLUMNS": 128}
NORM = {"WIDTH": 2048, "BLOCK": 2048, "ROWS": 2, "EPS": 1e-5, "HAS_MEANS": False}
TYPES = {
    "*fp64": ("maxima", "squares", "columns"),
    "*i64": ("assigned",),
    "*i32": (
        *("choices", "leads", "rooms", "filled", "members", "has_empty", "has_empty_before"),
        *("slots", "slots_before", "movers", "movers_before", "experts", "pairs", "ends"),
    ),
    "*fp32": (
        *("scales", "of_scales", "means", "of_means", "of_norm_weight", "of_norm_bias"),
        *("shifts", "parts"),
    ),
    "i32": ("N", "E", "C", "T", "PREFIX", "HEADS", "LINES", "BATCH", "BLOCKS", "PARTS"),
    "fp32": ("temperature", "temperature_before"),
}


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched."""

    name: str
    """`file:function` of megatron_smlp/ops/kernels."""
    pointer: str
    """The type of the pointers that TYPES does not list."""
    warps: int
    constants: dict[str, Any] = field(default_factory=dict)
    product: str = ""
    """Which of the table's tiles it uses; the table then sets the warps too."""
    wide: tuple[str, ...] = ()
    """Pointers that are fp32 in this case, whatever `pointer` is."""

    def with_tile(self, tile: Tile) -> Case:
        """Return the same product with another tile, and one stage fewer where M is in fp32."""
        tile = tiles.for_wide_weights(tile) if "weight" in self.wide else tile
        sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
        constants = self.constants | sizes | {"num_stages": tile.stages}
        return replace(self, warps=tile.warps, constants=constants)

    def on(self, capability: int) -> Case:
        """Return the case as launched on a GPU of this capability."""
        if not self.product or "ROWS" in self.constants:
            return self
        return self.with_tile(getattr(tiles.for_architecture(str(capability)), self.product))


def _product(function: str, product: str, *, is_routed: bool) -> Case:
    return Case(f"gated_mix:{function}", "*bf16", 0, GATE | {"ROUTED": is_routed}, product)


def _gate(*, is_routed: bool) -> dict[str, Case]:
    """Return all kernels of the gate except the one that sums the parts of dM."""
    behind = ", routed" if is_routed else ""
    lines = LINES | {"ROUTED": is_routed}
    return {
        f"gate: forward{behind}": _product("gated_mix", "gate", is_routed=is_routed),
        f"gate: dg, du1{behind}": Case("gated_mix:gradients_of_gate", "*bf16", 4, lines),
        f"gate: dv{behind}": _product("gradients_of_values", "values", is_routed=is_routed),
        f"gate: dM, db{behind}": _product("gradients_of_weights", "weights", is_routed=is_routed),
    }


CASES = {
    "assignment: extent": Case("assignment:extent", "*fp32", 8, ASSIGNMENT),
    "assignment: spread": Case("assignment:spread", "*fp32", 8, ASSIGNMENT),
    "assignment: first prices": Case(
        "assignment:balance", "*fp32", 8, ASSIGNMENT | {"FIRST": True}
    ),
    "assignment: prices": Case("assignment:balance", "*fp32", 8, ASSIGNMENT | {"FIRST": False}),
    "assignment: prices, 128 experts": Case(
        "assignment:balance", "*fp32", 16, ASSIGNMENT | {"W": 128, "BLOCK": 32, "FIRST": False}
    ),
    "assignment: choose": Case("assignment:choose", "*fp32", 8, ASSIGNMENT | {"FIRST": False}),
    "assignment: accept": Case("assignment:accept", "*fp32", 8, {"BLOCK": 8192}),
    "assignment: fill": Case("assignment:fill", "*fp32", 4, {"W": 64, "BLOCK": 1024}),
    "assignment: exchange": Case(
        "exchange:exchange", "*fp32", 8, ASSIGNMENT | {"FIRST": False, "LAST": False}
    ),
    **_gate(is_routed=False),
    **_gate(is_routed=True),
    **{
        f"{name}, fp32 M": replace(case, wide=("weight",))
        for name, case in _gate(is_routed=False).items()
        if name in ("gate: forward", "gate: dv")
    },
    "gate: dM in parts": replace(
        _product("gradients_of_weights", "weights", is_routed=False), wide=("of_weight",)
    ),
    "gate: sums of parts": Case("gated_mix:sums_of_parts", "*bf16", 4, {"COLUMNS": 1024}),
    "norm: forward": Case("gelu_norm:normed_gelu", "*bf16", 4, NORM),
    "norm: backward": Case("gelu_norm:gradients", "*bf16", 4, NORM),
}


def compiled(case: Case, capability: int) -> dict[str, Any]:
    """Compile one kernel as launched on such a GPU, and return its resource usage."""
    import triton
    from triton.backends.compiler import GPUTarget

    case = case.on(capability)
    target = GPUTarget("cuda", capability, 32)
    stages = {name: case.constants[name] for name in ("num_stages",) if name in case.constants}
    options = {"num_warps": case.warps} | stages | FUSED
    binary = triton.compile(_source(case), target=target, options=options)
    used = resources(binary.asm["cubin"])
    text = binary.asm["ptx"]
    counts = {name: text.count(word) for name, word in INSTRUCTIONS.items() if word in text}
    return used | {"shared": binary.metadata.shared, "instructions": counts}


def integers(case: Case) -> list[str]:
    """Return the kernel's integer arguments: Triton makes a constant of any that is 1."""
    signature = _source(case.on(90)).signature
    return [name for name, kind in signature.items() if kind == "i32"]


def lowered(case: Case, *, ones: Collection[str], divided: bool) -> None:
    """Run Triton's front end on one kernel: it rejects what it cannot type.

    Args:
        ones: the integers that are 1.
        divided: whether the other integers and the addresses are divisible by 16.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    case = case.on(90)
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": case.warps} | FUSED)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generators, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source = _source(case, ones=ones, divided=divided)
    source.make_ir(target, options, generators, modules, context)


def _source(case: Case, *, ones: Collection[str] = (), divided: bool = True) -> Any:
    from triton.compiler import ASTSource

    file, _, function = case.name.partition(":")
    module = __import__(f"megatron_smlp.ops.kernels.{file}", fromlist=[function])
    kernel = getattr(module, function)
    constants = {name: value for name, value in case.constants.items() if name in kernel.arg_names}
    constants |= dict.fromkeys(ones, 1)
    signature = {name: _type(name, case, constants) for name in kernel.arg_names}
    by_16 = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name] not in ("constexpr", "fp32") and divided
    }
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=by_16)


def _type(name: str, case: Case, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in case.wide:
        return "*fp32"
    kind = next((kind for kind, names in TYPES.items() if name in names), None)
    if kind is None and name.endswith(("_stride", "_token", "_sample")):
        return "i32"
    return kind or case.pointer


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers and stack bytes per thread, as NVIDIA's cuobjdump reports them."""
    from triton.backends import nvidia

    tool = Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(re.findall(rf"{name}:(\d+)", said)[0]) for name in ("REG", "STACK")}
    return {"registers": found["REG"], "stack": found["STACK"]}


def table(cases: Iterator[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    answer: dict[str, dict[str, Any]] = {}
    for name, capability in cases:
        answer.setdefault(name, {})[str(capability)] = compiled(CASES[name], capability)
    return answer


if __name__ == "__main__":
    everything = ((name, capability) for name in CASES for capability in CAPABILITIES)
    Path(sys.argv[1]).write_text(f"{json.dumps(table(everything), indent=1)}\n", encoding="utf-8")
