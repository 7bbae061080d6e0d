"""Time tiles of the causal gate's products on this GPU, and write its row of the table.

    python benchmarks/tune_kernels.py                      writes megatron_smlp/ops/tiles.json
    python benchmarks/tune_kernels.py --compile-only 90    prints what fits, on any machine

Each product is timed alone, at the sizes of configs/paper/regular with eight samples, in turns with
the current row, for all tiles that spill nothing and fit into shared memory. A tile's result may
differ from the current one by its dtype's rounding. A row changes if one is faster by MARGIN.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timing import Record, compare
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from megatron_smlp.ops import gated_mix_launches as launches  # noqa: E402
from megatron_smlp.ops import tiles  # noqa: E402
from megatron_smlp.ops.tiles import Tile, Tiles  # noqa: E402

PRODUCTS = ("gate", "values", "weights")
SIDES, DEPTHS, WARPS, STAGES = (64, 128, 256), (32, 64), (4, 8), (3, 4)
SUMS = range(32, 129)
"""Registers per thread for a tile's sums: more would spill, fewer leave the products waiting."""
WAVES = (1, 2, 3, 4)
"""Programs of dM per multiprocessor."""
MARGIN = 1.02
CALLS = 20  # before the host waits

type Timed = Callable[..., Record]


@dataclass(frozen=True)
class Problem:
    """Sizes, as lettered in megatron_smlp/ops/gated_mix.py; with `experts` matrices if routed."""

    tokens: int
    batch: int
    heads: int
    width: int
    experts: int = 0

    def operands(self, device: str) -> dict[str, Any]:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).bfloat16()

        shape = (self.tokens, self.batch, self.heads * self.width)
        matrices = self.experts or self.heads
        u1, values, upstream = (drawn(*shape) for _ in range(3))
        weight = drawn(matrices, self.tokens, self.tokens) / self.tokens**0.5
        routing: tuple[Any, ...] = (None, None, 0)
        if self.experts:
            chosen = torch.randint(self.experts, (2, self.batch, self.heads), dtype=torch.int32)
            scales = torch.rand(self.batch, self.heads)
            routing = (chosen.to(device), scales.to(device), self.tokens // 5)
        return {
            "u1": u1,
            "values": values,
            "upstream": upstream,
            "weight": weight,
            "bias": drawn(matrices, self.tokens),
            "routing": routing,
            "shifts": torch.zeros(self.heads, self.tokens, self.batch, 1, device=device),
        }


PROBLEMS = (Problem(1024, 8, 1, 2048), Problem(1024, 8, 16, 128), Problem(1024, 8, 16, 128, 16))
"""Dense layers, deterministic and partial prediction."""


def call_of(product: str, operands: dict[str, Any]) -> Callable[[], Tensor]:
    """Return a function that launches one product and returns its result."""
    o, routing = operands, operands["routing"]
    if product == "gate":
        return lambda: launches.gate(o["u1"], o["values"], o["weight"], o["bias"], None, *routing)[
            1
        ]
    if product == "values":
        return lambda: launches.gradients_of_values(o["upstream"], o["weight"], *routing)
    others = (o["values"], o["shifts"], o["bias"], torch.bfloat16, *routing)
    return lambda: launches.gradients_of_weights(o["upstream"], *others)[0]


def candidates() -> list[Tile]:
    every = itertools.product(SIDES, SIDES, DEPTHS, WARPS, STAGES)
    drawn = (Tile(*sizes) for sizes in every)
    return [tile for tile in drawn if tile.rows * tile.columns // (32 * tile.warps) in SUMS]


def compiled(product: str, tile: Tile, capability: int) -> dict[str, Any]:
    """Return the most that a product's kernels use, plain and routed, and whether they can run."""
    from support.compiled_kernels import CASES, SHARED
    from support.compiled_kernels import compiled as by_compiler

    room = SHARED.get(capability, min(SHARED.values()))
    cases = [case.with_tile(tile) for case in CASES.values() if case.product == product]
    try:
        taken = [by_compiler(case, capability) for case in cases]
    except Exception as error:  # the compiler's own kinds, for a tile that it has no layout for
        return {"fits": False, "why": f"{type(error).__name__}: {error}".splitlines()[0]}
    most = {name: max(used[name] for used in taken) for name in ("registers", "stack", "shared")}
    return most | {"fits": not most["stack"] and most["shared"] <= room}


@contextmanager
def launched_with(row: Tiles) -> Iterator[None]:
    """Launch the products with this row."""
    with patch.object(tiles, "for_device", lambda _: row):
        yield


def tuned(
    row: Tiles,
    product: str,
    choices: Iterable[Tiles],
    problems: Iterable[Problem],
    device: str,
    *,
    timed: Timed = compare,
) -> tuple[Tiles, float]:
    """Return the fastest row of the choices, and its product's speedup over the current row.

    Raises:
        ValueError: a result differs by more than rounding.
    """
    calls = [call_of(product, problem.operands(device)) for problem in problems]
    best, most = row, MARGIN
    for choice in choices:
        ratios = []
        for call in calls:
            with launched_with(row):
                expected = call()
            with launched_with(choice):
                _check(product, choice, call(), expected)
            name = f"{product}: {getattr(choice, product)}, {choice.programs} programs"
            record = timed(
                name, _in_turns(call, choice, device), _in_turns(call, row, device), repeats=10
            )
            ratios.append(record["ratio"])
        gain = math.prod(ratios) ** (1 / len(ratios))
        if gain > most:
            best, most = choice, gain
    return best, most if best != row else 1.0


def _in_turns(call: Callable[[], Tensor], row: Tiles, device: str) -> Callable[[], None]:
    def called() -> None:
        with launched_with(row):
            for _ in range(CALLS if device == "cuda" else 1):
                call()
        if device == "cuda":
            torch.cuda.synchronize()

    return called


def _check(product: str, choice: Tiles, ours: Tensor, expected: Tensor) -> None:
    rounding = 2 * torch.finfo(expected.dtype).eps
    error = (ours.float() - expected.float()).abs().max()
    if not error <= rounding * expected.float().abs().max():
        raise ValueError(f"{product} with {getattr(choice, product)}: another result, by {error}")


def choices_of(row: Tiles, product: str, capability: int, processors: int) -> Iterator[Tiles]:
    """Yield rows that differ from this one in a product's tile, and for dM also in the programs."""
    for tile in candidates():
        if compiled(product, tile, capability)["fits"]:
            waves = WAVES if product == "weights" else ()
            counts = [wave * processors for wave in waves] or [row.programs]
            yield from (row._replace(**{product: tile}, programs=count) for count in counts)


def written(row: Tiles, **facts: Any) -> dict[str, Any]:
    """Return a row in the table's format."""
    sizes = {product: getattr(row, product)._asdict() for product in PRODUCTS}
    return {**sizes, "programs": row.programs, **facts}


def write(rows: dict[str, Any], path: Path) -> None:
    """Write the table, one line per product."""
    texts = []
    for name, row in rows.items():
        lines = ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in row.items()
        )
        texts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")


def tune() -> None:
    """Time everything on this machine's GPU, and write its row."""
    import triton

    major, minor = torch.cuda.get_device_capability()
    gpu, name = torch.cuda.get_device_properties(0), f"{major}{minor}"
    row, gains = tiles.for_architecture(name), {}
    for product in PRODUCTS:
        choices = choices_of(row, product, int(name), gpu.multi_processor_count)
        row, gains[product] = tuned(row, product, choices, PROBLEMS, "cuda")
        print(
            f"{product}: {gains[product]:.2f} times as fast by {getattr(row, product)}", flush=True
        )
    rows = json.loads(tiles.TABLE.read_text(encoding="utf-8"))
    facts = {"device": gpu.name, "torch": torch.__version__, "triton": triton.__version__}
    rows[name] = written(row, **facts, gains={key: round(gain, 3) for key, gain in gains.items()})
    write(rows, tiles.TABLE)
    print(f"wrote the row {name} of {tiles.TABLE}")


def show(capability: int, choices: Sequence[Tile]) -> None:
    """Print what the compiler gives each tile of each product."""
    print(
        f"{'sm_' + str(capability):8} {'rows, columns, depth, warps, stages':36} registers  shared"
    )
    for product in PRODUCTS:
        for tile in choices:
            used = compiled(product, tile, capability)
            sizes = ", ".join(map(str, tile))
            if "why" in used:
                print(f"{product:8} {sizes:36} no: {used['why']}")
                continue
            spills = f", {used['stack']} bytes are spilled" if used["stack"] else ""
            verdict = "" if used["fits"] else f"  no{spills}"
            print(f"{product:8} {sizes:36} {used['registers']:9} {used['shared']:7}{verdict}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compile-only", type=int, metavar="CAPABILITY", help="80, 89, 90, 100, 120"
    )
    parser.add_argument(
        "--tile",
        type=lambda text: Tile(*map(int, text.split(","))),
        action="append",
        metavar="SIZES",
        help="with --compile-only: rows,columns,depth,warps,stages, not all; may be repeated",
    )
    arguments = parser.parse_args(argv)
    if arguments.compile_only:
        show(arguments.compile_only, arguments.tile or candidates())
        return 0
    if not torch.cuda.is_available():
        print("tune_kernels: skipped, there is no CUDA device; --compile-only 90 needs none")
        return 0
    torch.manual_seed(0)
    tune()
    return 0


if __name__ == "__main__":
    sys.exit(main())
