"""Choose the checkpoint that a run starts from: the newest intact one, the same on all ranks.

Rank 0 decides in which order to try them; the checksums of each are split over the ranks. On a slow
file system this may take longer than a collective's timeout, hence first_rank.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import folders_to_try, is_ours, iteration_of, tidy
from megatron_smlp.checkpoints.resume_checks import check_same_model, compare_run
from megatron_smlp.collectives import from_first_rank, gathered
from megatron_smlp.errors import NoGoodCheckpointError
from megatron_smlp.first_rank import await_all_ranks, first_rank_first

Say = Callable[[str], None]


def choose_checkpoint(args: argparse.Namespace, say: Say) -> Path | None:
    """Return the folder of the checkpoint to load, None to start from scratch; report the ones that
    were skipped. Collective.

    Raises:
        NoGoodCheckpointError: there are checkpoints, but none that may be loaded.
        UsageError: the one to load holds a different model than the flags describe, or was trained
            on other data.
    """
    folders: list[Path] = []
    with first_rank_first(args.rank):
        if args.rank == 0:
            for name in tidy(args.save) if args.save else []:
                say(f"removed {name}, left in {args.save} by an interrupted save or deletion")
            if args.load:
                folders = folders_to_try(args.load, args.ckpt_step)
    args.load, folders = from_first_rank((args.load, folders))
    if not folders:
        return None
    folder = _first_good(args, folders, say)
    iteration = iteration_of(folder)
    if iteration is None:
        return folder
    compare_run(args, iteration, say)
    if iteration != args.ckpt_step:
        check_same_model(args, iteration)
    return folder


def _first_good(args: argparse.Namespace, folders: list[Path], say: Say) -> Path:
    """Return the first folder without a problem, and warn of those before it. Collective."""
    refused: list[str] = []
    for folder in folders:
        damage = problems(folder)
        if not damage:
            _tell(refused, folder, say)
            return folder
        refused.append(f"{folder} is damaged ({'; '.join(damage)})")
        if args.strict_load or args.ckpt_step:
            break
    raise NoGoodCheckpointError(_refusal(args, refused))


def _tell(refused: list[str], folder: Path, say: Say) -> None:
    for text in refused:
        say(f"WARNING: {text}: not loaded")
    if refused:
        say(f"WARNING: resuming from {folder} instead, the newest intact one")
    if not is_ours(folder):
        say(f"{folder} has no checksums: it cannot be verified")


def _refusal(args: argparse.Namespace, refused: list[str]) -> str:
    if args.ckpt_step:
        remedy = f"--ckpt-step {args.ckpt_step} selects it: leave that out, or choose another one"
    elif args.strict_load:
        remedy = "without --strict-load an older one is loaded instead"
    else:
        remedy = "restore one, give another --load, or start from scratch with --no-resume"
    return f"{'; '.join(refused)}. Nothing was loaded: {remedy}."


def problems(folder: Path) -> list[str]:
    """Return a checkpoint's problems, one sentence each, the same on every rank. Collective."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plan: tuple[integrity.Sums, list[str]] | None = None
    with first_rank_first(rank):
        if rank == 0:
            plan = integrity.plan(folder)
    sums, texts = from_first_rank(plan)
    if not texts:
        own = integrity.problems_in(folder, dict(sorted(sums.items())[rank::size]))
        await_all_ranks(rank)  # until each has read its share
        texts = [text for part in gathered(own) for text in part]
    return sorted(texts)
