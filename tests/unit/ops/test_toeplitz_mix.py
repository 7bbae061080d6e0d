"""The Toeplitz product against its definition and the dense product: outputs, gradients."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_smlp.ops.causal_mix import causal_mix_reference
from megatron_smlp.ops.toeplitz_mix import toeplitz_mix, toeplitz_mix_reference

# (weights K, tokens T): odd, one block, exactly two, ragged; a prefix; sequences over K.
SIZES = [(1, 1), (63, 63), (128, 128), (256, 256), (1000, 1000), (1000, 300), (100, 777), (1, 130)]


def _inputs(
    heads: int, num_weights: int, length: int, columns: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * 7919 + num_weights * 31 + length + columns)
    shapes = [(heads, num_weights), (heads, length, columns), (heads, length, columns)]
    weight, values, gradient = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return weight, values, gradient


def _gradients(function, weight: Tensor, values: Tensor, gradient: Tensor) -> list[Tensor]:
    weight, values = weight.detach().requires_grad_(), values.detach().requires_grad_()
    output = function(weight, values)
    return [output.detach(), *torch.autograd.grad(output, (weight, values), gradient)]


def _assert_like_reference(weight: Tensor, values: Tensor, gradient: Tensor, rtol: float) -> None:
    ours = _gradients(toeplitz_mix, weight, values, gradient)
    exact = (tensor.double() for tensor in (weight, values, gradient))
    twin = _gradients(toeplitz_mix_reference, *exact)
    for name, left, right in zip(("output", "weight", "values"), ours, twin, strict=True):
        error = (left.double() - right).norm() / right.norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(("num_weights", "length"), SIZES)
@pytest.mark.parametrize(("heads", "columns"), [(1, 17), (3, 5)])
def test_matches_reference_in_float32(num_weights: int, length: int, heads: int, columns: int):
    _assert_like_reference(*_inputs(heads, num_weights, length, columns), rtol=2e-6)


def test_matches_reference_at_2047():
    _assert_like_reference(*_inputs(1, 2047, 2047, 4), rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_within_its_rounding(dtype: torch.dtype):
    _assert_like_reference(*_inputs(2, 700, 900, 16, dtype), rtol=4 * torch.finfo(dtype).eps)


def test_is_the_dense_product_with_a_toeplitz_matrix():
    weight, values, _ = _inputs(2, 63, 63, 5)
    distance = torch.arange(63)[:, None] - torch.arange(63)
    dense = weight[:, distance.clamp(min=0)].tril()
    torch.testing.assert_close(toeplitz_mix(weight, values), causal_mix_reference(dense, values))


@pytest.mark.parametrize(("num_weights", "length"), [(1, 1), (5, 5), (7, 3), (3, 9), (130, 200)])
def test_gradcheck_in_float64(num_weights: int, length: int):
    weight, values, _ = _inputs(2, num_weights, length, 2, torch.float64)
    inputs = (weight.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(toeplitz_mix, inputs, fast_mode=length > 9)


@pytest.mark.parametrize(("needs_weight", "needs_values"), [(True, False), (False, True)])
def test_computes_only_the_gradients_that_are_asked_for(needs_weight: bool, needs_values: bool):
    weight, values, gradient = _inputs(1, 200, 200, 4)
    weight.requires_grad_(needs_weight)
    values.requires_grad_(needs_values)
    toeplitz_mix(weight, values).backward(gradient)
    assert (weight.grad is not None, values.grad is not None) == (needs_weight, needs_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_values_never_reach_earlier_rows(dtype: torch.dtype):
    weight, values, _ = _inputs(2, 300, 401, 24, dtype)
    before = toeplitz_mix(weight, values)
    for position in (1, 127, 128, 200, 256, 400):
        changed = values.clone()
        changed[:, position:] = -1e6 * changed[:, position:] + 1.0
        after = toeplitz_mix(weight, changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


def test_values_further_back_than_the_weights_do_not_matter():
    weight, values, _ = _inputs(2, 150, 600, 8)
    changed = values.clone()
    changed[:, :200] = 1e6
    late = slice(200 + 149, None)
    after = toeplitz_mix(weight, changed)
    torch.testing.assert_close(after[:, late], toeplitz_mix(weight, values)[:, late])
    assert not torch.allclose(after[:, 348], toeplitz_mix(weight, values)[:, 348])


@pytest.mark.parametrize("prefix", [1, 63, 128, 300, 999])
def test_a_prefix_gives_the_same_rows(prefix: int):
    weight, values, _ = _inputs(2, 1000, 1000, 24)
    whole = toeplitz_mix(weight, values)[:, :prefix]
    part = toeplitz_mix(weight, values[:, :prefix])
    torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-4)


def _strided(tensor: Tensor) -> dict[str, Tensor]:
    return {
        "transposed": tensor.transpose(-2, -1).contiguous().transpose(-2, -1),
        "sliced": torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]],
        "strided": tensor.repeat_interleave(2, dim=-1)[..., ::2],
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_any_strides(layout: str):
    inputs = _inputs(3, 150, 150, 12)
    strided = [_strided(tensor)[layout] for tensor in inputs]
    expected = _gradients(toeplitz_mix, *inputs)
    for left, right in zip(_gradients(toeplitz_mix, *strided), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


def test_autocast_rounds_like_matmul_and_keeps_the_weight_gradient_in_float32():
    weight, values, gradient = _inputs(1, 300, 300, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = _gradients(toeplitz_mix, weight, values, gradient.bfloat16())
    assert (ours[0].dtype, ours[1].dtype) == (torch.bfloat16, torch.float32)
    twin = _gradients(toeplitz_mix_reference, weight, values, gradient)
    for left, right in zip(ours, twin, strict=True):
        assert (left - right).norm() / right.norm() < 4 * torch.finfo(torch.bfloat16).eps


def test_under_activation_recompute():
    inputs = _inputs(2, 130, 130, 8)
    expected = _gradients(toeplitz_mix, *inputs)
    recomputed = _gradients(
        lambda w, v: checkpoint(toeplitz_mix, w, v, use_reentrant=False), *inputs
    )
    for left, right in zip(recomputed, expected, strict=True):
        assert torch.equal(left, right)


def test_under_torch_compile_without_graph_breaks():
    # The `aot_eager` backend traces forward and backward, and needs no C++ compiler.
    inputs = _inputs(2, 130, 200, 8)
    compiled = torch.compile(
        lambda w, v: 2 * toeplitz_mix(w, v), backend="aot_eager", fullgraph=True
    )
    expected = _gradients(lambda w, v: 2 * toeplitz_mix(w, v), *inputs)
    for left, right in zip(_gradients(compiled, *inputs), expected, strict=True):
        torch.testing.assert_close(left, right)


def test_the_operator_passes_torchs_own_checks():
    weight, values, _ = _inputs(2, 9, 12, 3)
    operator = torch.ops.megatron_smlp.toeplitz_mix.default
    torch.library.opcheck(operator, (weight.requires_grad_(), values.requires_grad_()))


def test_nothing_but_its_inputs_is_kept_for_backward():
    weight, values, _ = _inputs(1, 256, 256, 2)
    weight.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        toeplitz_mix(weight, values)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert storages <= {weight.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()}


@pytest.mark.parametrize(("heads", "length", "columns"), [(2, 0, 3), (2, 3, 0), (0, 3, 3)])
def test_empty_inputs(heads: int, length: int, columns: int):
    inputs = _inputs(heads, 4, length, columns)
    expected = _gradients(toeplitz_mix_reference, *inputs) if length else None
    ours = _gradients(toeplitz_mix, *inputs)
    if expected is None:
        assert ours[0].numel() == 0
        assert torch.count_nonzero(ours[1]) == 0
        return
    for left, right in zip(ours, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("weight", "values"),
    [((2, 5, 5), (2, 5, 3)), ((1, 5), (2, 5, 3)), ((2, 0), (2, 5, 3)), ((5,), (5, 3))],
)
def test_shapes_that_do_not_fit_are_refused(weight: tuple[int, ...], values: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"weight \[E, K\]"):
        toeplitz_mix(torch.ones(weight), torch.ones(values))
