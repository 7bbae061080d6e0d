"""A run that was moved to another machine brings its tokenizer along."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_smlp.checkpoints.folders import iteration_folder
from megatron_smlp.checkpoints.tokenizer_copy import FOLDER, found_tokenizer, keep_tokenizer
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint


@pytest.fixture
def original(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "model.safetensors"):
        (folder / name).write_text(name)
    return folder


def kept(run: Path, **flags: str) -> list[str]:
    run.mkdir(exist_ok=True)
    keep_tokenizer(Namespace(**flags), run)
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def test_a_folder_is_copied_without_weights(tmp_path: Path, original: Path):
    names = ("merges.txt", "tokenizer.json", "tokenizer_config.json")
    assert kept(tmp_path / "run", tokenizer_model=str(original)) == [
        f"{FOLDER}/books/{name}" for name in names
    ]


def test_the_first_copy_stays_until_a_run_starts_from_scratch(tmp_path: Path, original: Path):
    run = tmp_path / "run"
    kept(run, tokenizer_model=str(original))
    (original / "tokenizer.json").write_text("another")
    for load, text in ((str(run), "tokenizer.json"), ("", "another")):
        kept(run, tokenizer_model=str(original), load=load)
        assert (run / FOLDER / "books" / "tokenizer.json").read_text() == text


def test_the_copy_is_read_where_the_original_is_not(tmp_path: Path, original: Path):
    run, recorded = tmp_path / "run", str(original)
    kept(run, tokenizer_model=recorded)
    assert found_tokenizer(recorded, run) == recorded
    shutil.rmtree(original)
    assert found_tokenizer(recorded, run) == str(run / FOLDER / "books")
    assert found_tokenizer("gpt2", run) == "gpt2"


def test_a_checkpoint_that_is_named_by_a_dot_knows_its_run(finished_run: Path, monkeypatch):
    """The copy is in the run's folder."""
    monkeypatch.chdir(iteration_folder(finished_run, 6))
    assert TorchDistCheckpoint(".").folder.parent == finished_run.resolve()


def test_a_name_of_the_hub_is_copied_from_its_cache(tmp_path: Path, monkeypatch):
    """The cache is laid out as transformers leaves it; the copy is read without a network."""
    repository = tmp_path / "cache" / "models--owner--Tokenizer-1"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123", encoding="utf-8")
    copied = {"tokenizer_config.json", "tokenizer.json", "tokenization_own.py"}
    for name in (*copied, "model.safetensors"):
        (snapshot / name).write_text("{}", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    run.mkdir()
    keep_tokenizer(Namespace(tokenizer_model="owner/Tokenizer-1"), run)
    found = Path(found_tokenizer("owner/Tokenizer-1", run))
    assert found == run / FOLDER / "Tokenizer-1"
    assert {path.name for path in found.iterdir()} == copied
    (tmp_path / "owner" / "Tokenizer-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # where a folder happens to have that name
    assert found_tokenizer("owner/Tokenizer-1", run) == str(found)
    for other in ("owner/Another", "no/such/repository"):
        keep_tokenizer(Namespace(tokenizer_model=other), tmp_path / "cache")
    assert not (tmp_path / "cache" / FOLDER).exists()
