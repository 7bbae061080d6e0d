"""Two ranks whose sample index takes longer to build than a collective's timeout."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Run, dataset_config, make_documents, write_pair
from support.launches import launch_calls

from megatron_smlp import first_rank
from megatron_smlp.errors import DataError

TIMEOUT, SLOW = 3.0, 4.0
"""Seconds of a collective's timeout, and of building an index."""


@pytest.fixture
def prefixes(run: Run, tmp_path: Path) -> list[str]:
    return [write_pair(run, tmp_path, name, make_documents(100)) for name in ("a", "b")]


@pytest.mark.parametrize(
    "kind", [pytest.param("a blend", marks=pytest.mark.slow), "slow on the second"]
)
def test_ranks_wait_for_an_index(tmp_path: Path, prefixes: list[str], kind: str):
    log = tmp_path / "log"
    blend = ["1", prefixes[0], "2", prefixes[1]] if kind == "a blend" else prefixes[:1]
    rank = int(kind == "slow on the second")
    launch_calls(_wait, blend, str(tmp_path / "cache"), rank, processes=2, log=log)
    told = f"index in {tmp_path / 'cache'}, or waiting for another run or rank to do so: 1 s so far"
    assert told in log.read_text(encoding="utf-8")


def test_a_rank_that_fails_says_why_to_the_others(tmp_path: Path, prefixes: list[str]):
    launch_calls(_fail, prefixes, str(tmp_path / "c"), processes=2, log=tmp_path / "log")


def _wait(blend: list[str], cache: str, slow: int) -> None:
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
    samples = torch.tensor(len(_built(blend, cache, rank)))
    torch.distributed.all_reduce(samples)
    assert int(samples) >= 40


def _fail(blend: list[str], cache: str) -> None:
    import torch

    from megatron_smlp.data.datasets import WatchedGPTDataset

    def refuses(dataset: Any) -> Any:
        raise DataError("no index today")

    rank = _join()
    build = WatchedGPTDataset._build_document_sample_shuffle_indices
    for failing in (0, 1):
        if rank == failing:
            WatchedGPTDataset._build_document_sample_shuffle_indices = refuses  # type: ignore
        with pytest.raises(DataError, match="no index today"):
            _built(blend, cache, rank)
        WatchedGPTDataset._build_document_sample_shuffle_indices = build
    with pytest.raises(DataError, match="read once without weights"):  # also where none is read
        _built(blend, cache, rank, samples=10**6, reads=rank == 0)
    torch.distributed.barrier()  # rank 0 hosts the store


def _join() -> int:
    import torch

    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))
    first_rank.FIRST_NOTICE = 1.0
    return torch.distributed.get_rank()


def _built(
    blend: list[str], cache: str, rank: int, *, samples: int = 20, reads: bool = True
) -> Any:
    from megatron_smlp.data.blending import Blends, parse_blend
    from megatron_smlp.data.datasets import build_datasets

    blends = Blends(parse_blend(blend, source="x"))
    return build_datasets(
        [samples, 0, 0],
        config=dataset_config(blends, Path(cache), "1,0,0"),
        is_built_on_rank=lambda: reads,
        rank=rank,
        say=(lambda line: print(line, flush=True)) if rank == 0 else lambda line: None,
    )[0]
