"""A small model without an embedding table: trained, resumed, exported, generated with, refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import checkpoint_tensors
from support.conversions import assert_same, folder_weights, from_hf, run
from support.in_process import pretrained
from support.language_models import save_tokenizer
from support.launches import records
from support.smlp_systems import make_config, make_ids
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert, llama
from megatron_smlp.errors import UsageError
from megatron_smlp.generation import cli
from megatron_smlp.layers.minhash import fingerprints

SIZES = "--hash-count 16 --filter-size 128 --window 2"
MINHASH = f"--architecture mixer --input-projection minhash {SIZES} --log-interval 1"
TABLE = "embedding.word_embeddings.fingerprints"
NO_NUMBERS = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model"
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """The folder of a run that saved after two steps and after four."""
    folder: Path = tmp_path_factory.mktemp("trained")
    words = f"{MINHASH} {NO_NUMBERS} {tokenizer} --lr 1e-2 --save {folder} --save-interval 2"
    with pretrained(words):
        losses = [r["loss"] for r in records(folder) if "loss" in r]
    assert losses[-1] < losses[0]
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    folder: Path = tmp_path_factory.mktemp("exported") / "hf"
    said = run(convert.torch_dist_to_hf, trained, folder)
    assert any("forward check" in line for line in said)
    return folder


def strings(folder: Path) -> list[tuple[int, bytes]]:
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return [(number, token.encode()) for token, number in vocabulary.items()]


def test_the_checkpoint_holds_the_tokenizers_fingerprints_and_no_embedding(
    trained: Path, tokenizer: Path
) -> None:
    checkpoint = TorchDistCheckpoint(trained)
    assert "embedding.word_embeddings.weight" not in checkpoint.specs
    rows = checkpoint.specs["output_layer.weight"].shape[0]
    table = fingerprints(strings(tokenizer), num_ids=rows, hash_count=16, filter_size=128)
    assert torch.equal(checkpoint.read(TABLE), table)
    assert not [name for name in checkpoint.all_specs if "optimizer" in name and TABLE in name]


@torch.no_grad()
def test_a_model_of_under_two_megabytes_generates_with_transformers_alone(
    exported: Path, tokenizer: Path
) -> None:
    """No tokenizer is asked: another one beside the weights changes no logit."""
    size = sum(path.stat().st_size for path in exported.glob("*.safetensors"))
    assert size < 2 * MEGABYTE
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    assert model.lm_head.weight.data_ptr() not in {
        parameter.data_ptr() for parameter in model.model.parameters()
    }
    prompt = make_ids(2, 5)
    with_cache = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert with_cache.shape == (2, 13)
    assert torch.equal(
        with_cache, model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    )
    before = folder_weights(exported)["model.embed_tokens.fingerprints"]
    assert torch.equal(model.model.embed_tokens.fingerprints, before)


def test_a_modern_transformer_behind_it_is_no_llama() -> None:
    llama_like = {"normalization": "RMSNorm", "num_experts": None, "moe_ffn_hidden_size": None}
    assert llama.fits(make_config("modern", **llama_like))
    assert not llama.fits(make_config("modern", **llama_like, input_projection="minhash"))


def test_vectors_in_the_place_of_tokens_fill_no_cache(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    with pytest.raises(ValueError, match="reads the tokens before each one again; give input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32), use_cache=True)


def test_a_checkpoint_generates_as_its_export(
    trained: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "abc", "--max-new-tokens", "6", "--temperature", "0"]
    texts = []
    for source in ("--checkpoint", str(trained)), ("--hf", str(exported)):
        cli.main([*source, *words])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("abc")


def test_it_comes_back_bitwise_with_another_padding(exported: Path, tmp_path: Path) -> None:
    run(from_hf, exported, tmp_path / "run", divisible_by=64)
    run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf")
    before, after = folder_weights(exported), folder_weights(tmp_path / "hf")
    tokens = 257
    assert {len(before[n]) for n in before if "fingerprints" in n or "lm_head" in n} == {260}
    assert {len(after[n]) for n in after if "fingerprints" in n or "lm_head" in n} == {320}
    cut = [
        {name: rows[:tokens] if len(rows) in (260, 320) else rows for name, rows in tensors.items()}
        for tensors in (before, after)
    ]
    assert_same(*cut)


def test_a_resume_ends_in_the_same_bits_whatever_the_tokenizer_says_by_then(
    trained: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """The checkpoint's table wins: here the tokenizer has got other strings in the meantime."""
    other = tmp_path / "tokenizer"
    save_tokenizer(other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"a":', '"aa":'), "utf-8")
    assert strings(other) != strings(tokenizer)
    words = f"{MINHASH} {NO_NUMBERS} {other} --lr 1e-2 --save {tmp_path / 'run'} --save-interval 2"
    with pretrained(f"{words} --load {trained} --ckpt-step 2"):
        pass
    whole, parts = (checkpoint_tensors(folder, 4) for folder in (trained, tmp_path / "run"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ("--input-projection minhash", "--tokenizer-type"),
        ("--hash-count 8", "--hash-count 8"),
        ("--window 0", "--window 0"),
        ("--input-projection minhash --filter-size 0", "--filter-size 0"),
        ("--input-projection minhash --window 16", "--window 16"),
    ],
)
def test_what_is_refused(parse: Callable[..., Any], argv: str, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        parse(f"--architecture mixer {argv}")


def test_a_checkpoint_of_the_other_input_is_refused(
    parse: Callable[..., Any], trained: Path, tokenizer: Path
) -> None:
    words = f"--architecture mixer {NO_NUMBERS} {tokenizer} --load {trained}"
    message = r"--input-projection embedding contradicts the checkpoint .* made with minhash"
    with pytest.raises(UsageError, match=message):
        parse(words)
    message = r"--filter-size 64 contradicts the checkpoint .* which was made with 128"
    with pytest.raises(UsageError, match=message):
        parse(f"{words} --input-projection minhash {SIZES} --filter-size 64")
