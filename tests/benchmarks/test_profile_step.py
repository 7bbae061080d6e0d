"""Every operator of a step has one kind, and the kinds add up to the step."""

import argparse

import pytest
from profile_step import kind_of
from timing import add_only


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


def test_a_case_is_chosen_by_its_name_or_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["gmlp bf16", "gmlp bf16, T 1024", "smlp"]
    parser = argparse.ArgumentParser()
    add_only(parser, names)
    assert parser.parse_args([]).cases == names
    assert parser.parse_args(["--only", "gmlp bf16"]).cases == names[:1]
    assert parser.parse_args(["--only", "mlp"]).cases == names
    with pytest.raises(SystemExit):
        parser.parse_args(["--only", "attention"])
    assert "--only: attention: no case holds this; the cases are" in capsys.readouterr().err
