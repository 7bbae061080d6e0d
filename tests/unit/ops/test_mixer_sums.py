"""AFT's averages and CausalRN's sums against their references, and with large exponents."""

import math

import pytest
import torch
from torch import Tensor

from megatron_smlp.ops import relation_mix as relations
from megatron_smlp.ops.aft_mix import aft_mix, aft_mix_reference
from megatron_smlp.ops.relation_mix import relation_mix, relation_mix_reference
from megatron_smlp.ops.running_sums import log_running_mean, running_average

BATCH, WIDTH = 2, 5
LONG = 2048


def with_gradients(function, *operands: Tensor) -> list[Tensor]:
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    output = function(*leaves)
    torch.manual_seed(4)
    upstream = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def assert_same(function, twin, *operands: Tensor, tolerance: float = 1e-10) -> None:
    results = zip(with_gradients(function, *operands), with_gradients(twin, *operands), strict=True)
    for left, right in results:
        assert left.isfinite().all()
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def operands(length: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = torch.randn(2, length, BATCH, WIDTH, dtype=torch.float64)
    return scale * keys, values, scale * torch.randn(length, length, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("length", [1, 63, 200])
def test_aft_mix_equals_its_twin(length: int, scale: float):
    assert_same(aft_mix, aft_mix_reference, *operands(length, scale=scale), tolerance=1e-9)


def test_what_lies_above_the_diagonal_is_not_read():
    keys, values, weight = operands(9)
    broken = weight + torch.full_like(weight, math.nan).triu(1)
    left, *gradients = with_gradients(aft_mix, keys, values, broken)
    assert torch.equal(left, aft_mix(keys, values, weight))
    assert not gradients[2].triu(1).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_exponents_of_aft(sign: int):
    """k and w up to 80, of opposite signs too, where neither maximum is near that of the sum."""
    torch.manual_seed(1)
    keys = torch.linspace(-80, 80, LONG)[:, None, None] * torch.tensor([1.0, -1.0, 0.5])
    values = torch.randn(LONG, 1, 3)
    weight = sign * torch.linspace(-80, 80, LONG).expand(LONG, LONG) + torch.randn(LONG, LONG)
    weight = weight.clamp(-80, 80)
    for left, right in zip(
        with_gradients(aft_mix, keys, values, weight),
        with_gradients(aft_mix_reference, keys.double(), values.double(), weight.double()),
        strict=True,
    ):
        assert left.isfinite().all()
        scale = right.abs().max()
        torch.testing.assert_close(left.double() / scale, right / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_key_reaches_what_averages_it_alone(dtype: torch.dtype):
    """Bitwise: neither earlier tokens, other samples nor other features."""
    keys, values, weight = (x.to(dtype) for x in operands(40))
    large = keys.clone()
    large[30, 1, 2] = 25.0
    mixed, gradient, *_ = with_gradients(aft_mix, large, values, weight)
    same = mixed == aft_mix(keys, values, weight)
    assert not same[30:, 1, 2].all()
    same[30:, 1, 2] = True
    assert same.all()
    double = aft_mix(large.double(), values.double(), weight.double())
    torch.testing.assert_close(mixed.double(), double, rtol=3e-2, atol=3e-2)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("factor", [2.0, 5.0])
def test_gradients_where_some_keys_are_large(factor: float):
    keys, values, weight = operands(63)
    keys[::7] *= factor * 10
    assert_same(aft_mix, aft_mix_reference, keys, values, weight, tolerance=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_aft_in_other_precisions(dtype: torch.dtype):
    keys, values, weight = (x.to(dtype) for x in operands(130, scale=3.0))
    expected = aft_mix_reference(keys.double(), values.double(), weight.double())
    mixed = aft_mix(keys, values, weight)
    assert mixed.dtype == dtype
    error = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(mixed.double(), expected, rtol=error, atol=error)


def naive_average(keys: Tensor, values: Tensor) -> Tensor:
    return aft_mix_reference(keys, values, keys.new_zeros(len(keys), len(keys)))


def naive_log_mean(exponents: Tensor) -> Tensor:
    rows = [exponents[: t + 1].logsumexp(0) - math.log(t + 1) for t in range(len(exponents))]
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("length", [1, 63, 200])
def test_running_sums_equal_their_loops(length: int, scale: float):
    keys, values, _ = operands(length, scale=scale)
    assert_same(running_average, naive_average, keys, values)
    assert_same(log_running_mean, naive_log_mean, keys)


@pytest.mark.parametrize("slope", [1, -1])
def test_large_exponents_of_running_sums(slope: int):
    """fp32 operands from -80 to 80 and back, T = 2,048: as exact as fp32 says it."""
    torch.manual_seed(1)
    keys = slope * torch.linspace(-80, 80, LONG)[:, None].expand(-1, 3).contiguous()
    values = torch.randn(LONG, 3)
    average = running_average(keys, values)
    weights = keys.double().exp()
    exact = (weights * values).cumsum(0) / weights.cumsum(0)
    torch.testing.assert_close(average.double(), exact, rtol=1e-5, atol=1e-7)
    exact = torch.logcumsumexp(keys.double(), 0) - torch.arange(1, LONG + 1)[:, None].log()
    torch.testing.assert_close(log_running_mean(keys).double(), exact, rtol=1e-5, atol=1e-5)
    for gradient in with_gradients(running_average, keys, values):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("block", [1, 100, 2**21])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_relation_mix_equals_its_twin(length: int, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(relations.BLOCK_ELEMENTS, "cpu", block)
    a, b, _ = operands(length)
    r = torch.rand(BATCH, length, length, dtype=torch.float64)
    assert_same(relation_mix, relation_mix_reference, a, b, r)


def test_relation_mix_never_has_all_pairs():
    """The largest tensor of forward and backward is that of one block, not [T, T, F]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            for each in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(each, Tensor):
                    self.elements = max(self.elements, each.numel())
            return output

    length, width = 256, 64
    a, b = torch.randn(2, length, 1, width)
    r = torch.full((1, length, length), 0.1)
    with Largest() as seen:
        with_gradients(relation_mix, a, b, r)
    assert seen.elements <= relations.BLOCK_ELEMENTS["cpu"] < length * length * width
