"""Assign token ids to experts, balanced over a run's training data (--hash-table balanced)."""

from __future__ import annotations

import argparse

import torch
from megatron.training import get_tokenizer
from torch import Tensor

from megatron_smlp.collectives import from_first_rank, gathered
from megatron_smlp.data.blending import blends_from_arguments
from megatron_smlp.data.token_counts import counts_of_datasets, mixture
from megatron_smlp.errors import DataError
from megatron_smlp.routers.hash_table import balanced_table


def experts_of_training_data(args: argparse.Namespace) -> Tensor:
    """Return the table of --hash-table balanced for the run's training data. Collective.

    Each rank counts a part of the data: waiting for a single rank could exceed the timeout of a
    collective. With --split, the validation documents are counted too.

    Returns:
        <int64>[ids of the tokenizer].
    """
    blends = blends_from_arguments(args)
    blend = blends.whole or (blends.per_split or (None,))[0]
    assert blend is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts, problem = torch.empty(0), ""
    try:
        own = counts_of_datasets(
            blend, vocab_size=get_tokenizer().vocab_size, part=args.rank, parts=args.world_size
        )
        counts = torch.from_numpy(own).to(device)
    except DataError as error:
        problem = str(error)
    if problem := next(filter(None, gathered(problem)), ""):
        raise DataError(problem)
    torch.distributed.all_reduce(counts)
    table = None
    if args.rank == 0:
        table = balanced_table(mixture(blend, counts.cpu().numpy()), num_experts=args.num_experts)
        table = torch.from_numpy(table)
    return from_first_rank(table)
