"""The tokenizer of an exported folder pads, and its model says with what."""

from pathlib import Path

import pytest
from support.language_models import END, save_tokenizer
from support.smlp_systems import make_model
from transformers import AutoTokenizer, pipeline
from transformers.utils import logging

from megatron_smlp.conversion.huggingface import _add_tokenizer
from megatron_smlp.hf import SMLPConfig, SMLPForCausalLM, SMLPModel

PADDING = "<pad>"


@pytest.mark.parametrize("own", [False, True], ids=["end", "own"])
def test_texts_of_unlike_lengths_make_a_batch(tmp_path: Path, own: bool):
    """Padded by the tokenizer's own entry for that, else by the end of a document."""
    entries = save_tokenizer(tmp_path / "tokenizer")
    if own:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        tokenizer.add_special_tokens({"pad_token": PADDING})
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = SMLPConfig(vocab_size=entries + 8, max_position_embeddings=32)
    _add_tokenizer(config, str(tmp_path / "tokenizer"), tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = exported(["one", "a longer text"], padding=True, return_tensors="pt")
    expected = exported.convert_tokens_to_ids(PADDING if own else END)
    assert batch["input_ids"][0, -1] == expected == config.pad_token_id
    assert exported.eos_token_id == config.eos_token_id == exported.convert_tokens_to_ids(END)


def test_the_package_has_its_classes():
    """`from megatron_smlp.hf import SMLPForCausalLM`, as a user of transformers writes it."""
    assert SMLPForCausalLM.config_class is SMLPModel.config_class is SMLPConfig


def test_a_pipeline_takes_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = make_model("gmlp", vocab_size=len(tokenizer))
    logging.enable_propagation()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    logging.disable_propagation()
    assert "is not supported" not in caplog.text
    [answer] = generator("a b", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("a b")
