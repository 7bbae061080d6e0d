"""The causal gate's kernels, interpreted, match their reference: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cover import selected, slow_unless_in
from support.gating import Gate, exactly, norm_exactly
from support.interpreted import interpreted
from torch import Tensor
from torch.nn import functional

from megatron_smlp.ops import gated_mix as gated_mix_module
from megatron_smlp.ops import gated_mix_launches as launches
from megatron_smlp.ops import tiles
from megatron_smlp.ops.gated_mix import gates_by_kernels

GATES = {
    "one head": Gate(63, 2, 1, 24, torch.float32, garbage=True),
    "heads, and something added": Gate(70, 3, 3, 20, torch.float32, has_added=True),
    "bf16": Gate(63, 2, 2, 40, torch.bfloat16, torch.bfloat16, has_added=True),
    "fp16, M in fp32": Gate(130, 1, 2, 16, torch.float16, garbage=True),
    "one token": Gate(1, 2, 1, 16, torch.float32),
    "no sample": Gate(5, 0, 1, 16, torch.float32),
    "GELU and LayerNorm": Gate(70, 2, 3, 20, torch.float32, has_added=True, normed=True),
    "GELU and LayerNorm, bf16": Gate(63, 2, 1, 40, torch.bfloat16, torch.bfloat16, normed=True),
    "routed": Gate(70, 3, 2, 20, torch.float32, experts=4, prefix=7, garbage=True),
    "routed, bf16": Gate(140, 1, 3, 16, torch.bfloat16, torch.bfloat16, experts=3, prefix=131),
    "routed, all prefix": Gate(9, 2, 2, 8, torch.float32, experts=3, prefix=9),
    "routed, no prefix": Gate(9, 2, 2, 8, torch.float32, experts=3),
}
PARTED = {
    "parts": Gate(140, 2, 1, 1100, torch.float32, garbage=True),
    "parts, bf16": Gate(63, 3, 2, 1000, torch.bfloat16, torch.bfloat16, has_added=True),
    "parts, routed": Gate(70, 3, 2, 1050, torch.float32, experts=3, prefix=7, garbage=True),
}
"""Gates for which dM's sums are split into two or more parts of unequal length."""
SLOW_GATES = {
    "1000 tokens": Gate(1000, 2, 2, 24, torch.bfloat16),
    "2047 tokens": Gate(2047, 1, 1, 144, torch.float16, torch.bfloat16),
    "many columns": Gate(256, 3, 1, 176, torch.float32, has_added=True),
    "many columns, LayerNorm": Gate(256, 3, 2, 176, torch.float32, has_added=True, normed=True),
    "1000 tokens, routed": Gate(1000, 2, 3, 150, torch.bfloat16, experts=4, prefix=100),
}
# Relative to the largest value. Half precision rounds y, dg and g, which gradients are made of.
ROUNDING = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


NORMED = ("GELU and LayerNorm", "GELU and LayerNorm, bf16")
LONGEST, LAST = "fp16, M in fp32", 129
"""Beyond a tile, which has 128 rows."""


@pytest.fixture(scope="module")
def interpretations(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    """Return each function's results for its gates, from one process: importing takes longest."""
    calls: dict[str, list[tuple[Any, ...]]] = {
        "by_kernels": [(gate,) for gate in GATES.values()],
        "norm_by_kernels": [(GATES[name],) for name in NORMED],
        "with_other_tokens_from": [(GATES[LONGEST], LAST)],
        "biases_of_no_shift": [()],
        "twice": [(PARTED[name],) for (name,) in sorted(selected(request, "parted"))],
    }
    pairs = [(name, arguments) for name, several in calls.items() for arguments in several]
    answers = iter(interpreted([(f"support.gating:{name}", rest) for name, rest in pairs]))
    return {name: [next(answers) for _ in several] for name, several in calls.items()}


@pytest.fixture(scope="module")
def answers(interpretations: dict[str, list[Any]]) -> dict[str, list[Tensor]]:
    return dict(zip(GATES, interpretations["by_kernels"], strict=True))


def _assert_close(gate: Gate, ours: list[Tensor]) -> None:
    rounding = max(ROUNDING[gate.dtype], ROUNDING[gate.weight_dtype])  # dM has the dtype of M
    for part, (one, exact) in enumerate(zip(ours, exactly(gate), strict=True)):
        assert one.shape == exact.shape
        if exact.numel():
            error = (one.double() - exact).abs().max()
            assert error <= rounding * exact.abs().max(), part


@pytest.mark.parametrize("case", GATES)
def test_outputs_and_gradients_are_the_references(case: str, answers: dict[str, list[Tensor]]):
    gate, ours = GATES[case], answers[case]
    assert len(ours) == len(gate.operands()) + 1
    _assert_close(gate, ours)
    for one, operand in zip(ours[1:], gate.operands(), strict=True):
        assert one.dtype == operand.dtype
    upper = torch.ones(gate.tokens, gate.tokens, dtype=torch.bool).triu(1)
    assert not ours[gate.matrix + 1][:, upper].any()


@pytest.mark.parametrize("parted", slow_unless_in(["parts"], PARTED))
def test_sums_in_parts(
    parted: str, interpretations: dict[str, list[Any]], request: pytest.FixtureRequest
):
    """The same bits whichever program comes first, and no unwritten memory is read."""
    gate = PARTED[parted]
    matrices = gate.experts or gate.heads
    columns = gate.batch * gate.heads * gate.width // matrices
    assert launches.num_parts(gate.tokens, matrices, columns, tiles.for_architecture("")) > 1
    number = sorted(selected(request, "parted")).index((parted,))
    ours, again = interpretations["twice"][number]
    _assert_close(gate, ours)
    for first, second in zip(ours, again, strict=True):
        assert torch.equal(first, second)


def test_db_is_summed_where_dg_is_made(interpretations: dict[str, list[Any]]):
    """dM's programs, each of which reads dg's rows, add to sums that are passed to them."""
    (of_bias,) = interpretations["biases_of_no_shift"]
    assert not of_bias.any()


# (programs, serial steps of 64 columns in each) of dM in a gMLP at T = 1,024, with eight samples
# of 2,048 features; without parts there were 136 programs of 256 steps.
PROGRAMS = {"80": (216, 43), "89": (252, 37), "90": (252, 37), "100": (288, 32), "120": (360, 26)}


@pytest.mark.parametrize("architecture", PROGRAMS)
def test_programs_of_dm_fill_a_gpu(architecture: str):
    row, columns = tiles.for_architecture(architecture), 8 * 2048
    parts = launches.num_parts(1024, 1, columns, row)
    programs = parts * sum(-(-end // row.weights.columns) for end in range(128, 1025, 128))
    steps = -(-columns // row.weights.depth // parts)
    assert (programs, steps) == PROGRAMS[architecture]
    assert launches.num_parts(1024, 16, 8 * 128, row) == 1, "of 16 matrices there are enough"


@pytest.mark.parametrize("name", NORMED)
def test_the_means_have_gradients_too(name: str, interpretations: dict[str, list[Any]]):
    """Partial prediction routes by the means."""
    gate, ours = GATES[name], interpretations["norm_by_kernels"][NORMED.index(name)]
    exact = norm_exactly(gate)
    assert ours[1].dtype == torch.float32
    assert len(ours) == len(exact)
    for one, other in zip(ours, exact, strict=True):
        error = (one.double() - other).abs().max()
        assert error <= ROUNDING[gate.dtype] * other.abs().max()


@pytest.mark.slow
def test_longer_sequences():
    answers = interpreted([("support.gating:by_kernels", (gate,)) for gate in SLOW_GATES.values()])
    for gate, ours in zip(SLOW_GATES.values(), answers, strict=True):
        _assert_close(gate, ours)


def test_later_tokens_are_in_no_row(interpretations: dict[str, list[Any]]):
    """Bitwise, and past the end of a tile."""
    before = interpretations["by_kernels"][list(GATES).index(LONGEST)][0]
    (changed,) = interpretations["with_other_tokens_from"]
    assert torch.equal(changed[:LAST], before[:LAST])
    assert not torch.equal(changed[LAST:], before[LAST:])


def test_a_length_that_16_does_not_divide_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(gated_mix_module, "use_kernels", lambda *_, **__: True)
    for length in (1024, 1000, 1000):
        assert gates_by_kernels(torch.empty(500, 1, 8), 1, functional.gelu, length)
    (record,) = caplog.records
    assert "16 does not divide 1000 tokens; --seq-length 1008 is" in record.getMessage()
