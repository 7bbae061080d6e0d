"""A small model without an embedding table, trained and resumed; other tests export it."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import checkpoint_tensors
from support.in_process import pretrained
from support.language_models import save_tokenizer
from support.launches import records
from tokenizers import Tokenizer

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.layers.minhash import fingerprints

SIZES = "--hash-count 16 --filter-size 128 --window 2"
MINHASH = f"--architecture mixer --input-projection minhash {SIZES} --log-interval 1"
TABLE = "embedding.word_embeddings.fingerprints"
NO_NUMBERS = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder: Path = tmp_path_factory.mktemp("trained")
    flags = f"{MINHASH} {NO_NUMBERS} {tokenizer} --lr 1e-2 --save {folder} --save-interval 2"
    with pretrained(flags):
        losses = [r["loss"] for r in records(folder) if "loss" in r]
    assert losses[-1] < losses[0]
    return folder


def strings(folder: Path) -> list[tuple[int, bytes]]:
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return [(number, token.encode()) for token, number in vocabulary.items()]


def test_the_checkpoint_holds_the_tokenizers_fingerprints_and_no_embedding(
    trained: Path, tokenizer: Path
):
    checkpoint = TorchDistCheckpoint(trained)
    assert "embedding.word_embeddings.weight" not in checkpoint.specs
    rows = checkpoint.specs["output_layer.weight"].shape[0]
    table = fingerprints(strings(tokenizer), num_ids=rows, hash_count=16, filter_size=128)
    assert torch.equal(checkpoint.read(TABLE), table)
    assert not [name for name in checkpoint.all_specs if "optimizer" in name and TABLE in name]


def test_a_resume_ends_in_the_same_bits_whatever_the_tokenizer_says_by_then(
    trained: Path, tokenizer: Path, tmp_path: Path
):
    """The checkpoint's table wins: here the tokenizer's strings have changed in the meantime."""
    other = tmp_path / "tokenizer"
    save_tokenizer(other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"a":', '"aa":'), "utf-8")
    assert strings(other) != strings(tokenizer)
    flags = f"{MINHASH} {NO_NUMBERS} {other} --lr 1e-2 --save {tmp_path / 'run'} --save-interval 2"
    with pretrained(f"{flags} --load {trained} --ckpt-step 2"):
        pass
    whole, parts = (checkpoint_tensors(folder, 4) for folder in (trained, tmp_path / "run"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
