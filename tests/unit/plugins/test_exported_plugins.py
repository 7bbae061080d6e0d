"""A plugin's class in transformers: what it computes, keeps in fp32, and ships with the export."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.in_process import MINIMAL, pretrained
from support.launches import REPOSITORY
from support.smlp_systems import VOCABULARY, make_ids
from torch import nn
from unit.hf.test_in_transformers import check_smoothed_labels
from unit.plugins.test_checks import GOOD, LISTENER

from megatron_smlp import options, plugin_files, plugin_texts
from megatron_smlp.errors import UsageError
from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import HOSTED, SMLPForCausalLM

pytestmark = pytest.mark.usefixtures("registry")

# A table that is derived from the length: in the class itself, and in a submodule.
MEAN = """
import torch
from torch import nn
from megatron_smlp.plugins import TokenMixer, ones, register


class Table(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.register_buffer("counts", torch.arange(1.0, length + 1)[:, None], persistent=False)


@register("mean")
class Mean(TokenMixer):
    def build(self, width, length):
        self.scale = self.parameter(width, cut=0, init=ones)
        self.register_buffer("mask", torch.ones(length, length).tril(), persistent=False)
        self.table = Table(length)

    def forward(self, value):
        t = value.shape[1]
        return self.scale() * (self.mask[:t, :t].to(value) @ value) / self.table.counts[:t]


register.architecture("mean", mixer="mean")
"""
LEVEL = """
from megatron_smlp.plugins import TokenRouter, register


@register("level")
class Level(TokenRouter):
    def scores(self, hidden, weight):
        return 0 * super().scores(hidden, weight) + 1
"""

OPEN = """
from megatron_smlp.plugins import TokenRouter, register


@register("open")
class Open(TokenRouter):
    experts_per_token = None

    def weigh(self, scores, chosen):
        return scores.gather(1, chosen).softmax(dim=-1) / self.experts_per_token
"""


def load(folder: Path, text: str, name: str = "mine") -> None:
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    plugin_files.load(str(path))


def config(architecture: str, **changes: Any) -> SMLPConfig:
    plugin = {"files": plugin_texts.recorded(), "options": {},
              "layers": [[architecture, "mlp"]] * 2}  # fmt: skip
    return SMLPConfig(**{
        "architecture": architecture, "plugin": plugin, "num_layers": 2, "hidden_size": 16,
        "ffn_hidden_size": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 12,
        "pad_token_id": 0, **changes,
    })  # fmt: skip


def built(made: SMLPConfig) -> nn.Module:
    from megatron_smlp.hf.modeling_plugin import SMLPPluginForCausalLM

    return SMLPPluginForCausalLM(made).eval()


@torch.no_grad()
def test_what_is_not_saved_is_computed_again(tmp_path: Path):
    load(tmp_path, MEAN)
    model = built(config("mean"))
    assert all(
        torch.equal(weight, torch.ones_like(weight))
        for name, weight in model.named_parameters()
        if name.endswith("scale.weight")
    )
    model.save_pretrained(tmp_path / "hf")
    again = type(model).from_pretrained(tmp_path / "hf").eval()
    ids = make_ids(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    half = type(model).from_pretrained(tmp_path / "hf", dtype=torch.bfloat16).eval()
    assert half.model.layers[0].mixer.mixer.mask.dtype == torch.bfloat16
    torch.testing.assert_close(half(ids).logits.float(), model(ids).logits, rtol=0.1, atol=0.05)


def test_smoothed_labels_are_the_next_tokens(tmp_path: Path):
    load(tmp_path, MEAN)
    check_smoothed_labels(built(config("mean")), tmp_path)


def test_the_packages_own_classes_refuse_a_plugins_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With megatron_smlp.hf imported, its classes are used, and they host no plugin."""
    load(tmp_path, MEAN)
    monkeypatch.delitem(HOSTED, "mixer", raising=False)
    with pytest.raises(ValueError, match="has a plugin's mixer, whose code is in its folder"):
        SMLPForCausalLM(config("mean"))


def test_a_checkpoint_generates_what_its_export_does(tmp_path: Path):
    from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
    from megatron_smlp.conversion import cli
    from megatron_smlp.generation.language_model import model_of

    load(tmp_path, MEAN)
    run = tmp_path / "run"
    with pretrained(f"--architecture mean --train-iters 2 --save {run}", base=MINIMAL):
        pass
    model = model_of(TorchDistCheckpoint(str(run), iteration=None))
    argv = ["--load", str(run), "--save", str(tmp_path / "hf"), "--to", "hf"]
    assert cli.main(argv) in (None, 0)  # its forward check compares with Megatron's model
    exported = type(model).from_pretrained(tmp_path / "hf").eval()
    ids = make_ids(2, 9) % 100
    torch.testing.assert_close(exported(ids).logits, model(ids).logits)


def test_k_of_an_open_rule_is_a_flag_and_part_of_the_export(tmp_path: Path):
    """So is the width of a shared expert, which goes with any router."""
    from megatron_smlp.conversion import cli

    load(tmp_path, OPEN)
    run, exported = str(tmp_path / "run"), str(tmp_path / "hf")
    flags = "--architecture transformer --num-attention-heads 4 --token-router open --num-experts 4"
    flags += " --moe-router-topk 3 --moe-shared-expert-intermediate-size 24 --train-iters 2"
    with pretrained(f"{flags} --save {run}", base=MINIMAL):
        pass
    argv = ["--load", run, "--save", exported, "--to", "hf"]
    assert cli.main(argv) in (None, 0)  # its forward check compares with Megatron's model
    made = SMLPConfig.from_pretrained(exported)
    assert (made.moe_router_topk, made.moe_shared_expert_intermediate_size) == (3, 24)
    argv = ["--load", exported, "--save", str(tmp_path / "back"), "--from", "hf"]
    assert cli.main([*argv, "--to", "torch_dist"]) in (None, 0)


@pytest.mark.parametrize(("router", "is_possible"), [("topk", True), ("switch", False)])
def test_k_of_a_configuration_is_that_of_its_rule(router: str, is_possible: bool):
    made = {"token_router": router, "num_experts": 4, "moe_router_topk": 3}
    if is_possible:
        assert SMLPConfig(**made).moe_router_topk == 3
        return
    with pytest.raises(ValueError, match="moe_router_topk=3: must be None with token_router=swi"):
        SMLPConfig(**made)


def test_buffers_of_a_routers_rule_stay_in_fp32(tmp_path: Path):
    plugin_files.load(str(REPOSITORY / "plugins" / "threshold.py"))
    values = {name: options.DEFAULTS[name]
               for name in options.PLUGIN_OPTIONS}  # fmt: skip
    plugin = {"files": plugin_texts.recorded(), "options": values, "layers": None}
    made = config(
        "transformer", plugin=plugin, token_router="threshold", num_experts=2, num_attention_heads=2
    )
    model = built(made).to(torch.bfloat16)
    rules = [part.rule for part in model.modules() if hasattr(part, "rule")]
    for rule in rules:
        rule.bound.fill_(0.1234567)
    model.save_pretrained(tmp_path / "hf")
    again = type(model).from_pretrained(tmp_path / "hf", dtype="auto")
    assert again.lm_head.weight.dtype == torch.bfloat16
    found = [part.rule.bound for part in again.modules() if hasattr(part, "rule")]
    assert len(found) == len(rules) > 0
    for bound in found:
        assert torch.equal(bound, torch.full_like(bound, 0.1234567, dtype=torch.float32))


def test_the_z_loss_is_of_a_routers_own_scores(tmp_path: Path):
    """The scores are all 1: (ln (2 e))^2 = (1 + ln 2)^2 in each of two layers."""
    load(tmp_path, LEVEL)
    plugin = {"files": {}, "options": {}, "layers": None}
    sizes = {"num_experts": 2, "num_attention_heads": 2, "moe_z_loss_coeff": 0.5}
    made = config("transformer", plugin=plugin, token_router="level", **sizes)
    loss = built(made).train()(make_ids(2, 9)).aux_loss
    assert loss.item() == pytest.approx((1 + math.log(2)) ** 2)


def test_a_class_of_another_plugin_goes_along(tmp_path: Path):
    load(tmp_path, GOOD)
    text = "from mine import GatedConv\nfrom megatron_smlp.plugins import register\n"
    text += "@register('other')\nclass Other(GatedConv): pass\n"
    load(tmp_path, text, "other")
    said = plugin_texts.LOADED["other"].exported()
    assert said.startswith("from .mine import GatedConv\nfrom .plugins import register\n")


@pytest.mark.parametrize("more", [LISTENER, "from megatron_smlp.errors import UsageError\n"])
def test_a_file_that_needs_this_package_does_not_go_along(tmp_path: Path, more: str):
    load(tmp_path, GOOD + more)
    said = r"mine.py cannot be exported with .* `from megatron_smlp\.(training|errors)"
    with pytest.raises(UsageError, match=said):
        plugin_texts.LOADED["mine"].exported()


@pytest.mark.parametrize("name", plugin_texts.EXPORTED)
def test_a_file_may_not_be_called_as_one_of_an_export(tmp_path: Path, name: str):
    assert (
        REPOSITORY / "megatron_smlp" / ("hf" if name != "plugins" else "") / f"{name}.py"
    ).exists()
    with pytest.raises(UsageError, match=f"{name}.py is named like a file of exported models"):
        load(tmp_path, GOOD, name)


def test_an_order_of_the_packages_mixers_takes_their_options_along(tmp_path: Path):
    """Spatial gating has --toeplitz; mixers that only the package's systems have are refused."""
    layers = [["attention", "mlp"], ["spatial_gating", "none"]]
    plugin = {"files": {}, "options": {}, "layers": layers}
    common = {"plugin": plugin, "num_attention_heads": 2}
    model = built(config("turns", toeplitz=True, **common))
    assert model(make_ids(1, 5)).logits.isfinite().all()
    with pytest.raises(ValueError, match="13 tokens is longer than max_position_embeddings=12"):
        model(make_ids(1, 13))  # past the last learned position
    common["position_embedding_type"] = "none"
    model = built(config("turns", toeplitz=True, **common))
    assert model(make_ids(1, 13)).logits.isfinite().all()
    mine = {**plugin, "layers": [["mean", "mlp"], ["spatial_gating", "none"]]}
    assert not config("turns", toeplitz=True, **{**common, "plugin": mine}).reads_any_length
    with pytest.raises(ValueError, match="mixer_expansion=True is for architecture=mixer, not tur"):
        config("turns", mixer_expansion=True, **common)
    text = "from megatron_smlp.plugins import register\nregister.architecture('m', mixer='{}')\n"
    for mixer in ("feature_moe", "gating_and_attention"):
        with pytest.raises(UsageError, match=f"'{mixer}' is only for --architecture amlp or smlp"):
            load(tmp_path, text.format(mixer))


@torch.no_grad()
def test_attention_and_mixers_with_two_states_share_a_cache():
    layers = [["masked_mixer", "none"], ["attention", "mlp"]]
    plugin = {"files": {}, "options": {}, "layers": layers}
    made = config("turns", plugin=plugin, num_attention_heads=2, mixer_expansion=True)
    model, ids = built(made), make_ids(2, 7)
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], cache=first.cache)
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-5)


def test_an_exports_files_are_python_3_11():
    """The oldest that transformers runs on; the package itself needs 3.12."""
    package = REPOSITORY / "megatron_smlp"
    for file in (*(package / "hf").glob("*.py"), package / "plugins.py"):
        ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(3, 11))


def test_what_a_plugin_imports_goes_with_it(tmp_path: Path):
    """Also where that registers nothing; what the folder could not import is refused."""
    for name, text in {
        "decays": "def decay(x):\n    return x / 2\n",
        "halving": "import torch\nfrom decays import decay\n" + GOOD,
        "whole": "import decays\n",
        "beside": "",
    }.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        if name != "whole":
            plugin_files.load(str(tmp_path / f"{name}.py"))
    assert list(plugin_texts.recorded()) == ["decays", "halving"]
    assert "from .decays import decay" in plugin_texts.LOADED["halving"].exported()
    path = tmp_path / "whole.py"
    whole = plugin_texts.PluginFile("whole", path, path.read_text(encoding="utf-8"))
    with pytest.raises(UsageError, match=r"`import decays`: write `from megatron_smlp.plugins imp"):
        whole.exported()
