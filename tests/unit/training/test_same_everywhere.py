"""Ranks started with different flags, data or packages, compared through torch's own store."""

import argparse
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.ranks import free_port

from megatron_smlp.errors import UnlikeRanksError
from megatron_smlp.training import same_everywhere
from megatron_smlp.training.same_everywhere import run_store

FLAGS = {
    "world_size": 2,
    "distributed_timeout_minutes": 1,
    "lr": 0.002,
    "data_path": ["0.3", "/data/a"],
    "tokenizer_model": None,
    "loss": len,
    "command_line": ["--lr", "0.002"],
    "data_contents": {"/data/a": "1" * 64, "/data/b": "2" * 64},
}


def stores(monkeypatch: pytest.MonkeyPatch, **of_second: Any) -> list[Any]:
    """Return the stores of two ranks; `of_second` overrides flags of the second."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    return meet(FLAGS, FLAGS | of_second)


def meet(*of_ranks: dict[str, Any]) -> list[Any]:
    both = [flags | {"rank": rank, "local_rank": rank} for rank, flags in enumerate(of_ranks)]
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda flags: run_store(argparse.Namespace(**flags)), both))


def test_ranks_meet_in_one_store(monkeypatch: pytest.MonkeyPatch):
    first, second = stores(monkeypatch)
    first.set("a", "b")
    assert second.get("a") == b"b"


def test_a_later_run_in_the_same_store_is_compared_anew(monkeypatch: pytest.MonkeyPatch):
    kept = stores(monkeypatch)
    kept += meet(FLAGS | {"lr": 0.1}, FLAGS | {"lr": 0.1})
    with pytest.raises(UnlikeRanksError, match=r"--lr is 0\.002 here, and 0\.1 there"):
        meet(FLAGS | {"lr": 0.1}, FLAGS)
    assert len(kept) == 4  # the store lives until here


def test_machines_have_paths_of_their_own(monkeypatch: pytest.MonkeyPatch):
    contents = {"/mnt/a": "1" * 64, "/mnt/b": "2" * 64}
    paths = {"data_path": ["0.3", "/mnt/b"], "tokenizer_model": "/mnt/c", "data_contents": contents}
    stores(monkeypatch, **paths, loss=max, command_line=["--config", "b.yaml"])


@pytest.mark.parametrize(
    ("of_second", "message"),
    [
        ({"lr": 0.1}, "rank 1 differs from rank 0: --lr is 0.1 here, and 0.002 there. "),
        ({"lr": None}, "--lr is None here, and 0.002 there"),
        ({"tokenizer_model": "gpt2"}, "--tokenizer-model is gpt2 here, and None"),
        (
            {"data_contents": {"a": "1" * 64, "b": "3" * 64}},
            "the content of dataset 2 is 333333333333 here, and 222222222222 there",
        ),
        ({"data_contents": {"a": "1" * 64}}, "the number of datasets is 1 here, and 2 there"),
    ],
)
def test_other_flags_are_refused(
    monkeypatch: pytest.MonkeyPatch, of_second: dict[str, Any], message: str
):
    with pytest.raises(UnlikeRanksError, match=re.escape(message)):
        stores(monkeypatch, **of_second)


def test_other_packages_are_refused(monkeypatch: pytest.MonkeyPatch):
    """The rank that asks first is told another version of torch than the second."""
    versions = iter(("2.15.0", "2.14.0"))
    monkeypatch.setattr(same_everywhere, "versions", lambda: {"torch": next(versions)})
    with pytest.raises(UnlikeRanksError, match=r"torch is 2\.1[45]\.0 here, and 2\.1[45]\.0 there"):
        stores(monkeypatch)


def test_other_code_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Such as checkouts of two commits, or two texts of a plugin."""
    hashes = iter(("1f", "2f"))
    monkeypatch.setattr(same_everywhere, "software", lambda: {"sources": next(hashes)})
    with pytest.raises(UnlikeRanksError, match=r"the code .* is [12]f here, and [12]f there"):
        stores(monkeypatch)


def test_one_process_needs_no_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    store = run_store(argparse.Namespace())
    store.set("a", "b")
    assert store.get("a") == b"b"
