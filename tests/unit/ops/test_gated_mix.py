"""The causal gate's kernels, interpreted, against their reference: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gating import Gate, exactly, norm_exactly
from support.interpreted import interpreted
from torch import Tensor
from torch.nn import functional

from megatron_smlp.ops import gated_mix as gated_mix_module
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
SLOW_GATES = {
    "1000 tokens": Gate(1000, 2, 2, 24, torch.bfloat16),
    "2047 tokens": Gate(2047, 1, 1, 144, torch.float16, torch.bfloat16),
    "many columns": Gate(256, 3, 1, 176, torch.float32, has_added=True),
    "many columns, LayerNorm": Gate(256, 3, 2, 176, torch.float32, has_added=True, normed=True),
    "1000 tokens, routed": Gate(1000, 2, 3, 150, torch.bfloat16, experts=4, prefix=100),
}
# Of the largest value. A half rounds y, and dg and g, which the gradients are made of.
ROUNDING = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


NORMED = ("GELU and LayerNorm", "GELU and LayerNorm, bf16")
LONGEST, LAST = "fp16, M in fp32", 129
"""Over a tile, which is 128 rows."""


@pytest.fixture(scope="module")
def interpretations() -> dict[str, list[Any]]:
    """What each function makes of its gates: all in one process, as importing takes longest."""
    calls: dict[str, list[tuple[Any, ...]]] = {
        "by_kernels": [(gate,) for gate in GATES.values()],
        "norm_by_kernels": [(GATES[name],) for name in NORMED],
        "with_other_tokens_from": [(GATES[LONGEST], LAST)],
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
def test_outputs_and_gradients_are_the_twins(case: str, answers: dict[str, list[Tensor]]):
    gate, ours = GATES[case], answers[case]
    assert len(ours) == len(gate.operands()) + 1
    _assert_close(gate, ours)
    for one, operand in zip(ours[1:], gate.operands(), strict=True):
        assert one.dtype == operand.dtype
    upper = torch.ones(gate.tokens, gate.tokens, dtype=torch.bool).triu(1)
    assert not ours[gate.matrix + 1][:, upper].any()


@pytest.mark.parametrize("name", NORMED)
def test_the_means_have_gradients_too(name: str, interpretations: dict[str, list[Any]]):
    """Partial prediction routes by them."""
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
    """Bit by bit, and past the end of a tile."""
    before = interpretations["by_kernels"][list(GATES).index(LONGEST)][0]
    (changed,) = interpretations["with_other_tokens_from"]
    assert torch.equal(changed[:LAST], before[:LAST])
    assert not torch.equal(changed[LAST:], before[LAST:])


def test_a_length_that_16_does_not_divide_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(gated_mix_module, "use_kernels", lambda *_, **__: True)
    for length in (1024, 1000, 1000):
        assert gates_by_kernels(torch.empty(length, 1, 8), 1, functional.gelu)
    (record,) = caplog.records
    assert "16 does not divide 1000 tokens; --seq-length 1008 is" in record.getMessage()
