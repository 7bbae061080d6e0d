"""Two ranks whose sample index takes longer to build than a collective may last."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from data_helpers import BYTE_FLAGS, dataset_config, make_documents, write_jsonl
from support.launches import launch_calls

from megatron_smlp import first_rank
from megatron_smlp.data.prepare.preprocessing import Summary
from megatron_smlp.errors import DataError

TIMEOUT, SLOW = 3.0, 5.0
"""Seconds of a collective, and of an index."""


@pytest.fixture
def prefixes(run: Callable[..., Summary], tmp_path: Path) -> list[str]:
    for name in ("a", "b"):
        source = write_jsonl(tmp_path / f"{name}.jsonl", make_documents(100))
        run(source, tmp_path / name, *BYTE_FLAGS)
    return [str(tmp_path / f"{name}_text_document") for name in ("a", "b")]


@pytest.mark.parametrize("kind", ["a blend", "slow on the second"])
def test_ranks_wait_for_an_index(tmp_path: Path, prefixes: list[str], kind: str):
    log = tmp_path / "log"
    words = ["1", prefixes[0], "2", prefixes[1]] if kind == "a blend" else prefixes[:1]
    rank = int(kind == "slow on the second")
    launch_calls(_wait, words, str(tmp_path / "cache"), rank, processes=2, log=log)
    told = (
        f"index in {tmp_path / 'cache'}, or waiting for another run or rank that does: 1 s so far"
    )
    assert told in log.read_text(encoding="utf-8")


def test_a_first_rank_that_fails_says_why_to_the_others(tmp_path: Path, prefixes: list[str]):
    launch_calls(_fail, prefixes[:1], str(tmp_path / "c"), processes=2, log=tmp_path / "log")


def _wait(words: list[str], cache: str, slow: int) -> None:
    """Build on a rank, then meet the other in a collective."""
    import torch

    from megatron_smlp.data.datasets import WatchedGPTDataset

    rank = _join()
    build = WatchedGPTDataset._build_document_sample_shuffle_indices
    pauses = [SLOW] if rank == slow else []

    def slowly(dataset: Any) -> Any:
        time.sleep(pauses.pop() if pauses else 0)
        return build(dataset)

    WatchedGPTDataset._build_document_sample_shuffle_indices = slowly  # type: ignore
    samples = torch.tensor(len(_built(words, cache, rank)))
    torch.distributed.all_reduce(samples)
    assert int(samples) >= 40


def _fail(words: list[str], cache: str) -> None:
    from megatron_smlp.data.datasets import WatchedGPTDataset

    def refuses(dataset: Any) -> Any:
        raise DataError("no index today")

    rank = _join()
    if rank == 0:
        WatchedGPTDataset._build_document_sample_shuffle_indices = refuses  # type: ignore
    with pytest.raises(DataError, match="no index today"):
        _built(words, cache, rank)
    time.sleep(2)  # the store is that of rank 0


def _join() -> int:
    import torch

    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))
    first_rank.FIRST_NOTICE = 1.0
    return torch.distributed.get_rank()


def _built(words: list[str], cache: str, rank: int) -> Any:
    from megatron_smlp.data.blending import Blends, parse_blend
    from megatron_smlp.data.datasets import build_datasets

    blends = Blends(parse_blend(words, source="x"))
    return build_datasets(
        [20, 0, 0],
        blends=blends,
        config=dataset_config(blends, Path(cache), "1,0,0"),
        is_built_on_rank=lambda: True,
        rank=rank,
        say=(lambda line: print(line, flush=True)) if rank == 0 else lambda line: None,
    )[0]


def test_a_first_rank_that_is_frozen_is_given_up():
    """Its machine answers nothing, not even that the connection is over."""
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("spawn")
    there, here = context.Pipe()
    keeper = context.Process(target=_keep_a_store, args=(there,))
    keeper.start()
    try:
        store = TCPStore("127.0.0.1", here.recv(), is_master=False)
        threading.Timer(1.0, os.kill, (keeper.pid, signal.SIGSTOP)).start()
        with pytest.raises(TimeoutError, match="rank 0 has not answered for 2 s"):
            first_rank._awaited(store, "never", silence=2.0)
    finally:
        keeper.kill()
        keeper.join()


def _keep_a_store(pipe: Any) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    time.sleep(600)
