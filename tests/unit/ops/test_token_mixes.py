"""The triangular and the Toeplitz product match their references: outputs, gradients, causality.

Letters: E heads, T tokens, K weights of a Toeplitz matrix, N columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_smlp.ops import blocks
from megatron_smlp.ops.causal_mix import causal_mix, causal_mix_reference
from megatron_smlp.ops.toeplitz_mix import toeplitz_mix, toeplitz_mix_reference


class Product(NamedTuple):
    mix: Callable[[Tensor, Tensor], Tensor]
    reference: Callable[[Tensor, Tensor], Tensor]

    def shape(self, heads: int, length: int, num_weights: int | None) -> tuple[int, ...]:
        if self.mix is causal_mix:
            return (heads, length, length)
        return (heads, length if num_weights is None else num_weights)


CAUSAL = Product(causal_mix, causal_mix_reference)
TOEPLITZ = Product(toeplitz_mix, toeplitz_mix_reference)
PRODUCTS = {"causal": CAUSAL, "toeplitz": TOEPLITZ}
both = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
# Odd lengths, one leaf, exactly two leaves, several levels with a ragged end.
LENGTHS = [1, 2, 63, 128, 256, 257, 1000]
# (T, K): more weights than tokens, and fewer.
OTHER_WEIGHTS = [(300, 1000), (777, 100), (130, 1)]
SIZES = [(product, length, None) for product in PRODUCTS.values() for length in LENGTHS]
SIZES += [(TOEPLITZ, length, num_weights) for length, num_weights in OTHER_WEIGHTS]


def _inputs(
    product: Product,
    heads: int,
    length: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    num_weights: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight, the values and the gradient of the output."""
    generator = torch.Generator().manual_seed(heads * 7919 + length * 31 + columns)
    weight_shape = product.shape(heads, length, num_weights)
    shapes = [weight_shape, (heads, length, columns), (heads, length, columns)]
    weight, values, gradient = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return weight, values, gradient


def _gradients(function, weight: Tensor, values: Tensor, gradient: Tensor) -> list[Tensor]:
    weight, values = weight.detach().requires_grad_(), values.detach().requires_grad_()
    output = function(weight, values)
    return [output.detach(), *torch.autograd.grad(output, (weight, values), gradient)]


def _assert_like_reference(product: Product, inputs: tuple[Tensor, ...], rtol: float) -> None:
    ours = _gradients(product.mix, *inputs)
    exact = _gradients(product.reference, *(tensor.double() for tensor in inputs))
    for name, left, right in zip(("output", "weight", "values"), ours, exact, strict=True):
        error = (left.double() - right).norm() / right.norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(("product", "length", "num_weights"), SIZES)
@pytest.mark.parametrize(("heads", "columns"), [(1, 17), (3, 5)])
def test_matches_reference_in_float32(
    product: Product, length: int, num_weights: int | None, heads: int, columns: int
):
    inputs = _inputs(product, heads, length, columns, num_weights=num_weights)
    _assert_like_reference(product, inputs, rtol=2e-6)


@pytest.fixture(params=[False, True], ids=["", "tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Use the block sizes of a CPU without and with AMX, whatever this one has."""
    monkeypatch.setattr(blocks, "multiplies_tiles", lambda: request.param)
    is_there: bool = request.param
    return is_there


def test_leaves_are_longer_in_tiles(tiles: bool):
    values = torch.empty(1, 1, 1, dtype=torch.bfloat16)
    assert blocks.block_length(values, in_tiles=512) == (512 if tiles else 128)
    assert blocks.block_length(values.float(), in_tiles=512) == 128


@both
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_within_its_rounding(product: Product, dtype: torch.dtype):
    inputs = _inputs(product, 2, 900, 16, dtype, num_weights=700)
    _assert_like_reference(product, inputs, rtol=4 * torch.finfo(dtype).eps)


def test_a_toeplitz_product_is_the_dense_one_with_its_matrix():
    weight, values, _ = _inputs(TOEPLITZ, 2, 63, 5)
    distance = torch.arange(63)[:, None] - torch.arange(63)
    dense = weight[:, distance.clamp(min=0)].tril()
    torch.testing.assert_close(toeplitz_mix(weight, values), causal_mix_reference(dense, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_above_the_diagonal_does_not_matter(dtype: torch.dtype):
    weight, values, gradient = _inputs(CAUSAL, 2, 300, 8, dtype)
    poisoned = weight.clone()
    poisoned[torch.ones_like(weight, dtype=torch.bool).triu(1)] = torch.nan
    clean = _gradients(causal_mix, weight, values, gradient)
    for left, right in zip(_gradients(causal_mix, poisoned, values, gradient), clean, strict=True):
        assert torch.equal(left, right)
    assert torch.count_nonzero(clean[1].triu(1)) == 0


@both
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_values_never_reach_earlier_rows(product: Product, dtype: torch.dtype):
    weight, values, _ = _inputs(product, 2, 601, 24, dtype, num_weights=300)
    before = product.mix(weight, values)
    for position in (1, 127, 128, 200, 256, 511, 512, 600):
        changed = values.clone()
        changed[:, position:] = -1e6 * changed[:, position:] + 1.0
        after = product.mix(weight, changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


def _strided(tensor: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]
    if layout == "strided":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


@both
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "heads last"])
def test_any_strides(product: Product, layout: str):
    inputs = _inputs(product, 3, 150, 12)
    strided = [_strided(tensor, layout) for tensor in inputs]
    expected = _gradients(product.mix, *inputs)
    for left, right in zip(_gradients(product.mix, *strided), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


@both
def test_autocast_rounds_like_matmul_and_keeps_the_weight_gradient_in_float32(product: Product):
    weight, values, gradient = _inputs(product, 1, 300, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = _gradients(product.mix, weight, values, gradient.bfloat16())
    assert (ours[0].dtype, ours[1].dtype) == (torch.bfloat16, torch.float32)
    exact = _gradients(product.reference, weight, values, gradient)
    for left, right in zip(ours, exact, strict=True):
        assert (left - right).norm() / right.norm() < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_operator_passes_torchs_own_checks(name: str):
    weight, values, _ = _inputs(PRODUCTS[name], 2, 9, 3, num_weights=12)
    operator = getattr(torch.ops.megatron_smlp, f"{name}_mix").default
    torch.library.opcheck(operator, (weight.requires_grad_(), values.requires_grad_()))


@both
def test_nothing_but_its_inputs_is_kept_for_backward(product: Product):
    weight, values, _ = _inputs(product, 1, 256, 2)
    weight.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product.mix(weight, values)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert storages <= {weight.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()}
