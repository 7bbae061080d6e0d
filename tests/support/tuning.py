"""Run benchmarks/tune_kernels.py with interpreted kernels and a clock that the test controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.launches import import_benchmarks

from megatron_smlp.ops import gated_mix_launches
from megatron_smlp.ops.tiles import Tile, Tiles

TILES = (Tile(16, 32, 16, 4, 3), Tile(32, 16, 32, 4, 3), Tile(32, 32, 16, 4, 3))
ROW = Tiles(*(Tile(64, 64, 32, 4, 3),) * 3, programs=8)


def tuned(product: str, ratios: list[float]) -> tuple[Tiles, float]:
    """Return the choice among TILES where they are `ratios` times as fast as ROW."""
    import_benchmarks()
    import tune_kernels

    problems = (tune_kernels.Problem(40, 2, 1, 24), tune_kernels.Problem(40, 2, 2, 16, 3))
    clock = iter([ratio for ratio in ratios for _ in problems])

    def timed(_: str, ours: Callable[[], None], peer: Callable[[], None], **__: Any) -> Any:
        ours(), peer()
        return {"ratio": next(clock)}

    torch.manual_seed(0)
    choices = [ROW._replace(**{product: tile}) for tile in TILES]
    return tune_kernels.tuned(ROW, product, choices, problems, "cpu", timed=timed)


def tuned_to_other_results(product: str) -> str:
    """Return the error where every second call of a product returns twice the result."""
    name = {"values": "gradients_of_values"}[product]
    launch, calls = getattr(gated_mix_launches, name), iter(range(1, 100))

    def doubled(*arguments: Any) -> Any:
        result = launch(*arguments)
        return result * 2 if next(calls) % 2 == 0 else result

    setattr(gated_mix_launches, name, doubled)
    try:
        tuned(product, [1.0] * len(TILES))
    except ValueError as error:
        return str(error)
    finally:
        setattr(gated_mix_launches, name, launch)
    return ""
