"""Every operator of a step has one kind, and the kinds add up to the step."""

import pytest
from profile_step import kind_of


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm_", "matrix products"),
        ("aten::gelu_backward", "GELU"),
        ("aten::native_layer_norm_backward", "LayerNorm"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_fused_adamw_", "Adam"),
        ("aten::mul_", "sums and products"),
        ("aten::copy_", "copies, casts"),
        ("aten::addcmul", "other operators"),
        ("aten::sort", "other operators"),
        ("autograd::engine::evaluate_function", None),
    ],
)
def test_operators_have_kinds(operator: str, kind: str | None) -> None:
    assert kind_of(operator) == kind
