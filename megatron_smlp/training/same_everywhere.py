"""Refuses ranks whose flags, data or code differ from rank 0's, before the first collective.

Each machine has its own command line, configuration file and installation, and possibly its own
copy of the data. If these differ, ranks hang in collectives that others never enter or, say with
another learning rate, train replicas that silently drift apart.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore, Store

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UnlikeRanksError
from megatron_smlp.provenance import software, versions

OWN = frozenset({"rank", "local_rank", "command_line"})
"""Arguments that differ by rank, or only say where flags come from. Paths are not compared either:
each machine may keep the same data on its own disk."""
TO_MEET = timedelta(minutes=10)
"""At least so long ranks wait for the others to start, which read packages and data first."""
PLAIN = (bool, int, float, str, list, tuple, type(None))
"""Types whose text is the same in every process."""
RUNS: Counter[int] = Counter()
"""Number of calls by each rank of this process, for unique keys: a store may outlive a run."""


def run_store(args: argparse.Namespace) -> Any:
    """Return the ranks' rendezvous store, in place of the one that torch would open.

    Raises:
        UnlikeRanksError: this rank's flags, data, code or packages are not those of rank 0.
    """
    if "MASTER_ADDR" not in os.environ:
        return HashStore()  # started without a launcher
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    where = f"env://?rank={args.rank}&world_size={args.world_size}"
    store, *_ = next(torch.distributed.rendezvous(where, timeout=max(timeout, TO_MEET)))
    store.set_timeout(timeout)
    RUNS[args.rank] += 1
    # Not the restart count: it differs on an agent that saw no failure.
    check_same(
        store, f"what rank 0 runs with/{RUNS[args.rank]}", rank=args.rank, what=what_counts(args)
    )
    return PrefixStore("default_pg", store)  # torch's own prefix


def what_counts(args: argparse.Namespace) -> dict[str, str]:
    """Return by name what must be the same on all ranks: flags other than paths, the content of
    each dataset, the code, package versions."""
    flags = {
        flag_of(name): str(value)
        for name, value in vars(args).items()
        if name not in OWN and isinstance(value, PLAIN) and os.sep not in str(value)
    }
    contents = args.data_contents.values()  # filled in by check_data
    data = {f"the content of dataset {n}": digest[:12] for n, digest in enumerate(contents, 1)}
    data["the number of datasets"] = str(len(contents))
    code = {"the code (a hash of the package and plugins)": software()["sources"]}
    return flags | data | code | {name: str(version) for name, version in versions().items()}


def check_same(store: Store, key: str, *, rank: int, what: Mapping[str, str]) -> None:
    """Compare with rank 0, which only publishes its values and waits for nobody.

    Args:
        key: the key, unique to this run, under which rank 0 publishes them.

    Raises:
        UnlikeRanksError: something differs.
    """
    if rank == 0:
        store.set(key, json.dumps(what))
        return
    different = list(_differences(what, json.loads(store.get(key))))
    if different:
        raise UnlikeRanksError(
            f"rank {rank} differs from rank 0: {'; '.join(different)}. Give all machines the same "
            "flags, configuration files, data, code and packages."
        )


def _differences(here: Mapping[str, str], there: Mapping[str, str]) -> Iterator[str]:
    for name, value in here.items():
        if value != there.get(name, value):  # absent there where its value is a path
            yield f"{name} is {value} here, and {there[name]} there"
