"""The table of architectures, by name: what fills the two slots of each layer."""

import dataclasses
import re
import subprocess
import sys

import pytest
from support.launches import REPOSITORY

from megatron_smlp.options import (
    LayerSlots,
    ModelOptions,
    RunOptions,
    is_moe_layer,
    layer_slots,
    model_option_names,
    prefix_length,
)

ATTENTION, GATING, FEATURE = "attention", "spatial_gating", "feature_moe"


def table(
    options: ModelOptions, *, num_experts: int | None = None, freq: int | list[int] = 1
) -> list[tuple[str, str, int]]:
    slots = layer_slots(
        options, num_layers=4, num_experts=num_experts, moe_layer_freq=freq, num_attention_heads=8
    )
    assert all(isinstance(row, LayerSlots) for row in slots)
    return [dataclasses.astuple(row) for row in slots]


def test_dense_transformer():
    assert table(ModelOptions()) == [(ATTENTION, "mlp", 8)] * 4


def test_transformer_moe_in_every_second_layer_from_the_first():
    rows = [(ATTENTION, "token_moe", 8), (ATTENTION, "mlp", 8)] * 2
    assert table(ModelOptions(), num_experts=2, freq=2) == rows


def test_gmlp_has_its_channel_mixer_inside():
    options = ModelOptions(architecture="gmlp", spatial_heads=3)
    assert table(options) == [(GATING, "none", 3)] * 4


def test_gmlp_with_token_moe_by_a_pattern():
    options = ModelOptions(architecture="gmlp")
    dense, routed = (GATING, "none", 1), (GATING, "token_moe", 1)
    rows = [dense, routed, routed, dense]
    assert table(options, num_experts=2, freq=[0, 1, 1, 0]) == rows


@pytest.mark.parametrize("dense", [0, 1, 4])
def test_smlp_is_dense_layers_and_then_sparse_ones(dense: int):
    """moe_layer_freq does not move what --num-dense-layers places."""
    options = ModelOptions(
        architecture="smlp",
        spatial_heads=2,
        feature_router="deterministic",
        num_feature_experts=5,
        num_dense_layers=dense,
    )
    rows = [(GATING, "none", 2)] * dense + [(FEATURE, "token_moe", 5)] * (4 - dense)
    assert table(options, num_experts=2, freq=2) == rows


def test_smlp_ablations():
    """The paper's: feature MoE without token MoE, and token MoE without feature MoE."""
    features = ModelOptions(
        architecture="smlp",
        feature_router="deterministic",
        num_feature_experts=5,
        num_dense_layers=3,
    )
    assert table(features)[3] == (FEATURE, "none", 5)
    tokens = ModelOptions(architecture="smlp", spatial_heads=2, num_dense_layers=3)
    assert table(tokens, num_experts=2)[3] == (GATING, "token_moe", 2)


@pytest.mark.parametrize(
    ("freq", "expected"),
    [(1, [1, 1, 1, 1, 1]), (2, [1, 0, 1, 0, 1]), (3, [1, 0, 0, 1, 0]), ([0, 0, 1, 0, 1], None)],
)
def test_placement_is_megatrons(freq: int | list[int], expected: list[int] | None):
    placed = [is_moe_layer(index, freq) for index in range(5)]
    assert placed == [bool(value) for value in expected or freq]


@pytest.mark.parametrize("options", [ModelOptions, RunOptions])
def test_every_field_says_what_it_is(options: type):
    """The text under a field is its help on the command line and its row in docs/flags.md."""
    from megatron_smlp.flags.parse import build_parser

    helps = {action.dest: action.help for action in build_parser()._actions}
    for field in dataclasses.fields(options):
        assert len(helps[field.name] or "") > 30, field.name


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"--[a-z0-9-]+", text))


def test_the_help_files_are_those_of_the_parser():
    """They are read instead of the parser, which takes seconds to build."""
    from megatron_smlp.flags import help
    from megatron_smlp.flags.parse import build_parser

    remedy = "run `python -m megatron_smlp.flags.help`"
    written = help.HELP_FILE.read_text(encoding="utf-8")
    # Python versions break the lines differently.
    assert flags_of(written) == flags_of(help.help_text(build_parser())), remedy
    assert help.FLAGS_PAGE.read_text(encoding="utf-8") == help.flags_page(build_parser()), remedy


def test_help_of_the_real_command_imports_nothing_heavy():
    code = (
        "import sys; from pretrain_smlp import main; main(['--help']); "
        "sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for flag in ("--num-layers", "--feature-router", "--dry-run"):
        assert f"  {flag} " in done.stdout


def test_model_option_names_are_the_fields():
    assert set(model_option_names()) == set(vars(ModelOptions()))


@pytest.mark.parametrize(
    ("fraction", "length", "prefix"),
    [(0.2, 1024, 204), (0.2, 1000, 200), (0.29, 100, 29), (0.57, 200, 114), (1e-3, 2000, 2)],
)
def test_the_prefix_is_the_floor_of_the_written_fraction(fraction: float, length: int, prefix: int):
    """In binary, 0.29 x 100 is less than 29."""
    options = ModelOptions(feature_router="partial", prefix_fraction=fraction)
    assert prefix_length(options, seq_length=length) == prefix
    options.feature_router = "deterministic"
    assert prefix_length(options, seq_length=length) == 0
