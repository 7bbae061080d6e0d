"""README.md of an exported folder: the Hub's parser reads it, and its code runs as printed."""

import math
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.conversions import run
from support.cover import slow_unless_in
from support.in_process import pretrained
from support.language_models import save_tokenizer
from support.launches import records, run_command
from transformers import AutoModelForCausalLM

from megatron_smlp.conversion import convert
from megatron_smlp.conversion.model_card import training_facts
from megatron_smlp.metrics_records import MetricsFile

SYSTEMS = {
    "sparse": "--architecture smlp --num-dense-layers 1 --feature-router deterministic "
    "--num-feature-experts 2 --num-experts 4 --token-router hash --eval-interval 3",
    "llama": "--architecture transformer --num-attention-heads 4 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu",
}


@pytest.fixture(scope="module", params=slow_unless_in(["sparse"], SYSTEMS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 4 iterations of two samples of 16 tokens; the last validation is at 3, or at 4."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    with pretrained(f"{SYSTEMS[request.param]} --vocab-size 300 --save {folder}"):
        return folder


def test_the_card_says_what_the_checkpoint_knows(trained: Path, tmp_path: Path):
    run(convert.torch_dist_to_hf, trained, tmp_path / "hf", license="apache-2.0", checks=False)
    about = ModelCard.load(tmp_path / "hf" / "README.md").data
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert (about.license, about.library_name) == ("apache-2.0", "transformers")
    assert about.pipeline_tag == "text-generation"
    assert {"megatron-smlp", model.config.model_type} <= set(about.tags)
    text = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert "# hf\n" in text
    validated = [line for line in records(trained) if "validation_loss" in line]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = ["| training tokens | 128 |", "| iteration | 4 |", f"| parameters | {parameters:,} |"]
    rows += ["| optimizer | adam |", "| global batch size | 2 |", "| seed | 1234 |"]
    if validated:
        rows.append(f"| validation loss | {validated[-1]['validation_loss']:.4f}")
    for row in rows:
        assert row in text
    assert ("trust_remote_code" in text) == ("Llama" not in type(model).__name__)


def test_a_card_without_a_license_says_none(trained: Path, tmp_path: Path):
    """The card of a release says nothing of training; without metrics it gives no loss."""
    run(convert.to_torch_dist, trained, tmp_path / "weights", checks=False)
    run(convert.torch_dist_to_hf, tmp_path / "weights", tmp_path / "hf", checks=False)
    text = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert ModelCard.load(tmp_path / "hf" / "README.md").data.license is None
    assert "license" not in text
    assert not re.search("iteration|training tokens|validation", text)


def test_a_loss_that_is_no_number_is_one_of_a_card(tmp_path: Path):
    MetricsFile(str(tmp_path)).write({"iteration": 3, "validation_loss": math.nan})
    facts = training_facts(tmp_path / "iter_0000004", {"iteration": 4})
    assert facts["validation loss"] == "nan (iteration 3)"


@pytest.mark.slow  # test_exported_alone.py runs the code of one card
@pytest.mark.parametrize("tokenizer", [True, False])
def test_its_code_loads_the_model(trained: Path, tmp_path: Path, tokenizer: bool):
    save_tokenizer(tmp_path / "tokenizer")
    more = {"tokenizer_model": str(tmp_path / "tokenizer")} if tokenizer else {}
    run(convert.torch_dist_to_hf, trained, tmp_path / "hf", checks=False, **more)
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.splitlines()) == 5
    done = run_command([sys.executable, "-c", code], cwd=tmp_path / "hf", HF_HUB_OFFLINE="1")
    assert ("The" in done.stdout) == tokenizer
