"""The table of architectures, by name: what fills the two slots of each layer."""

import dataclasses
import sys
from argparse import Namespace

import pytest
from support.launches import run_command

from megatron_smlp.flags import help
from megatron_smlp.options import MODEL_FLAGS, OUR_FLAGS, ModelOptions
from megatron_smlp.partial_prediction import prefix_length
from megatron_smlp.systems import ARCHITECTURES, layer_slots

ATTENTION, GATING, FEATURE = "attention", "spatial_gating", "feature_moe"


DENSE, GATED, SPARSE = (ATTENTION, "mlp", 8), (GATING, "none", 1), (FEATURE, "token_moe", 5)
SMLP = {"architecture": "smlp", "feature_router": "deterministic", "num_feature_experts": 5}
TABLES = {
    # Options, token experts and their placement -> mixer, channel mixer and heads of each layer.
    "transformer": ({}, None, 1, [DENSE] * 4),
    "every second layer": ({}, 2, 2, [(ATTENTION, "token_moe", 8), DENSE] * 2),
    "gmlp": ({"architecture": "gmlp"}, None, 1, [GATED] * 4),
    "a pattern": ({"architecture": "gmlp"}, 2, [1, 0, 0, 1],
                  [(GATING, "token_moe", 1), GATED, GATED, (GATING, "token_moe", 1)]),
    # --moe-layer-freq does not move what --num-dense-layers places.
    **{f"{n} dense layers": (SMLP | {"num_dense_layers": n}, 2, 2, [GATED] * n + [SPARSE] * (4 - n))
       for n in (0, 1, 4)},
    # The paper's ablations.
    "feature MoE alone": (SMLP | {"num_dense_layers": 3}, None, 1,
                          [GATED] * 3 + [(FEATURE, "none", 5)]),
    "token MoE alone": ({"architecture": "smlp", "spatial_heads": 2, "num_dense_layers": 3}, 2, 1,
                        [(GATING, "none", 2)] * 3 + [(GATING, "token_moe", 2)]),
}  # fmt: skip


@pytest.mark.parametrize(("options", "experts", "freq", "rows"), TABLES.values(), ids=TABLES)
def test_what_fills_the_slots(options: dict, experts: int | None, freq: object, rows: list):
    sizes = Namespace(num_layers=4, moe_layer_freq=freq, num_attention_heads=8)
    slots = layer_slots(ModelOptions(**options), sizes, num_experts=experts)
    assert [dataclasses.astuple(row) for row in slots] == rows


def test_the_page_of_flags_is_that_of_the_records():
    written = help.FLAGS_PAGE.read_text(encoding="utf-8")
    assert written == help.flags_page(), "run `python -m megatron_smlp.flags.help`"


def test_help_of_the_real_command_imports_nothing_heavy():
    code = (
        "import sys; from pretrain_smlp import main; main(['--help']); "
        "sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    )
    shown = run_command([sys.executable, "-c", code]).stdout
    for flag in ("  --feature-router", "  --dry-run", "--help-all"):
        assert flag in shown


def test_full_help_lists_megatrons_flags_too(capsys: pytest.CaptureFixture[str]):
    assert help.answered(["--help-all"])
    shown = capsys.readouterr().out
    for flag in ("--num-layers", "--feature-router", "--dry-run"):
        assert f"  {flag} " in shown


def test_megatrons_defaults_are_those_of_its_parser():
    """The accounting and old checkpoints fill gaps from the records of Megatron's flags."""
    from megatron_smlp.flag_facts import MEGATRON_FLAGS
    from megatron_smlp.flags.parse import build_parser

    parsed = build_parser().parse_args([])
    defaults = {name: flag.default for name, flag in MEGATRON_FLAGS.items()}
    assert {name: getattr(parsed, name) for name in defaults} == defaults


def test_records_of_the_hugging_face_configuration_are_those_of_its_file():
    """configuration_smlp.py stands alone, so it repeats names, defaults and choices."""
    from megatron_smlp.hf import configuration_smlp as hf

    theirs = {field.name: field.default for field in dataclasses.fields(hf.SMLPConfig)}
    missing = {facts.hf for facts in MODEL_FLAGS.values() if facts.hf} - set(theirs)
    assert not missing, f"hf/configuration_smlp.py lacks the fields {', '.join(sorted(missing))}"
    allowed = {row[0]: row[1] for row in help.rows(ModelOptions)}
    for field in dataclasses.fields(ModelOptions):
        name = OUR_FLAGS[field.name].hf
        # SMLPConfig defaults to sMLP.
        if name and name != "architecture":
            assert theirs[name] == field.default, name
        choices = allowed[field.name]
        if name and choices.startswith("{"):
            assert set(choices.strip("{}").split(",")) == set(hf._ALLOWED[name])
    with_ffn = {name for name, one in ARCHITECTURES.items() if one.channel == "mlp"}
    learned = {n for n, one in ARCHITECTURES.items() if one.positions == "learned_absolute"}
    assert (set(hf._FEED_FORWARD), set(hf._ATTENTION)) == (with_ffn, learned)
    assert set(hf._TOEPLITZ) == set(OUR_FLAGS["toeplitz"].architectures)


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
