"""The triangular product against its masked dense twin: outputs, gradients, causality."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_smlp.ops.causal_mix import causal_mix, causal_mix_reference

# Odd lengths, one leaf, exactly two leaves, several levels with a ragged end.
LENGTHS = [1, 2, 63, 128, 256, 257, 1000]


def _inputs(
    heads: int, length: int, columns: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * 7919 + length * 31 + columns)
    shapes = [(heads, length, length), (heads, length, columns), (heads, length, columns)]
    weight, values, gradient = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return weight, values, gradient


def _gradients(function, weight: Tensor, values: Tensor, gradient: Tensor) -> list[Tensor]:
    weight, values = weight.detach().requires_grad_(), values.detach().requires_grad_()
    output = function(weight, values)
    return [output.detach(), *torch.autograd.grad(output, (weight, values), gradient)]


def _assert_like_reference(weight: Tensor, values: Tensor, gradient: Tensor, rtol: float) -> None:
    ours = _gradients(causal_mix, weight, values, gradient)
    twin = _gradients(causal_mix_reference, weight.double(), values.double(), gradient.double())
    for name, left, right in zip(("output", "weight", "values"), ours, twin, strict=True):
        error = (left.double() - right).norm() / right.norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "columns"), [(1, 17), (3, 5)])
def test_matches_reference_in_float32(length: int, heads: int, columns: int):
    _assert_like_reference(*_inputs(heads, length, columns), rtol=2e-6)


def test_matches_reference_at_2047():
    _assert_like_reference(*_inputs(1, 2047, 8), rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_within_its_rounding(dtype: torch.dtype):
    _assert_like_reference(*_inputs(2, 700, 16, dtype), rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("length", [1, 5, 130])
def test_gradcheck_in_float64(length: int):
    weight, values, _ = _inputs(2, length, 2, torch.float64)
    # What lies above the diagonal has a zero gradient, which gradcheck confirms numerically.
    inputs = (weight.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(causal_mix, inputs, fast_mode=length > 5)


@pytest.mark.parametrize(("needs_weight", "needs_values"), [(True, False), (False, True)])
def test_computes_only_the_gradients_that_are_asked_for(needs_weight: bool, needs_values: bool):
    weight, values, gradient = _inputs(1, 200, 4)
    weight.requires_grad_(needs_weight)
    values.requires_grad_(needs_values)
    causal_mix(weight, values).backward(gradient)
    assert (weight.grad is not None, values.grad is not None) == (needs_weight, needs_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_above_the_diagonal_does_not_matter(dtype: torch.dtype):
    weight, values, gradient = _inputs(2, 300, 8, dtype)
    poisoned = weight.clone()
    poisoned[torch.ones_like(weight, dtype=torch.bool).triu(1)] = torch.nan
    clean = _gradients(causal_mix, weight, values, gradient)
    for left, right in zip(_gradients(causal_mix, poisoned, values, gradient), clean, strict=True):
        assert torch.equal(left, right)
    assert torch.count_nonzero(clean[1].triu(1)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_values_never_reach_earlier_rows(dtype: torch.dtype):
    weight, values, _ = _inputs(2, 401, 24, dtype)
    before = causal_mix(weight, values)
    for position in (1, 127, 128, 200, 256, 400):
        changed = values.clone()
        changed[:, position:] = -3.0 * changed[:, position:] + 1.0
        after = causal_mix(weight, changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


@pytest.mark.parametrize("prefix", [1, 63, 128, 300, 999])
def test_a_prefix_gives_the_same_rows(prefix: int):
    weight, values, _ = _inputs(2, 1000, 24)
    whole = causal_mix(weight, values)[:, :prefix]
    part = causal_mix(weight[:, :prefix, :prefix], values[:, :prefix])
    torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-4)


def _strided(tensor: Tensor) -> dict[str, Tensor]:
    return {
        "transposed": tensor.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]],
        "strided": tensor.repeat_interleave(2, dim=-1)[..., ::2],
        "heads last": tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "heads last"])
def test_any_strides(layout: str):
    weight, values, gradient = _inputs(3, 150, 12)
    strided = [_strided(tensor)[layout] for tensor in (weight, values, gradient)]
    expected = _gradients(causal_mix, weight, values, gradient)
    for left, right in zip(_gradients(causal_mix, *strided), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


def test_an_expanded_gradient():
    weight, values, _ = _inputs(1, 140, 6)
    ours, twin = (
        _gradients(lambda w, v, f=f: f(w, v).sum(), weight, values, torch.tensor(1.0))
        for f in (causal_mix, causal_mix_reference)
    )
    for left, right in zip(ours, twin, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_autocast_rounds_like_matmul_and_keeps_the_weight_gradient_in_float32():
    weight, values, gradient = _inputs(1, 300, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weight_gradient, values_gradient = _gradients(
            causal_mix, weight, values, gradient.bfloat16()
        )
    assert (output.dtype, weight_gradient.dtype) == (torch.bfloat16, torch.float32)
    twin = _gradients(causal_mix_reference, weight, values, gradient)
    for left, right in zip((output, weight_gradient, values_gradient), twin, strict=True):
        assert (left - right).norm() / right.norm() < 4 * torch.finfo(torch.bfloat16).eps


def test_under_activation_recompute():
    weight, values, gradient = _inputs(2, 130, 8)
    expected = _gradients(causal_mix, weight, values, gradient)
    recomputed = _gradients(
        lambda w, v: checkpoint(causal_mix, w, v, use_reentrant=False), weight, values, gradient
    )
    for left, right in zip(recomputed, expected, strict=True):
        assert torch.equal(left, right)


def test_under_torch_compile_without_graph_breaks():
    # The `aot_eager` backend traces forward and backward, and needs no C++ compiler.
    weight, values, gradient = _inputs(2, 130, 8)
    compiled = torch.compile(lambda w, v: 2 * causal_mix(w, v), backend="aot_eager", fullgraph=True)
    expected = _gradients(lambda w, v: 2 * causal_mix(w, v), weight, values, gradient)
    for left, right in zip(_gradients(compiled, weight, values, gradient), expected, strict=True):
        torch.testing.assert_close(left, right)


def test_the_operator_passes_torchs_own_checks():
    weight, values, _ = _inputs(2, 9, 3)
    operator = torch.ops.megatron_smlp.causal_mix.default
    torch.library.opcheck(operator, (weight.requires_grad_(), values.requires_grad_()))


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    weight, values, _ = _inputs(1, 256, 2)
    weight.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        causal_mix(weight, values)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert storages <= {weight.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()}


@pytest.mark.parametrize(("heads", "length", "columns"), [(2, 0, 3), (2, 3, 0), (0, 3, 3)])
def test_empty_inputs(heads: int, length: int, columns: int):
    weight, values, gradient = _inputs(heads, length, columns)
    expected = _gradients(causal_mix_reference, weight, values, gradient)
    for left, right in zip(_gradients(causal_mix, weight, values, gradient), expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("weight", "values"),
    [((2, 5, 5), (2, 4, 3)), ((2, 5, 4), (2, 5, 3)), ((1, 5, 5), (2, 5, 3)), ((5, 5), (5, 3))],
)
def test_shapes_that_do_not_fit_are_refused(weight: tuple[int, ...], values: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"weight\[:, :t, :t\]"):
        causal_mix(torch.ones(weight), torch.ones(values))
