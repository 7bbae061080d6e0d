"""Iterators over micro-batches, from Megatron's samplers and loaders.

Training continues at the first sample after the last checkpoint. Every evaluation starts over, so
that all evaluations of a run read the same samples.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.training.datasets.data_samplers import build_pretraining_data_loader

from megatron_smlp.collectives import gathered
from megatron_smlp.data.blending import has_data
from megatron_smlp.signals import held
from megatron_smlp.training.data import run_datasets
from megatron_smlp.training.parts import PerChunk, per_chunk


@dataclass(frozen=True)
class EvaluationSet:
    """One dataset that a run is evaluated on."""

    title: str
    """`validation`, `validation NAME` or `test`."""
    loaders: list[Any]
    """torch's DataLoader of each chunk; None on a rank that reads nothing."""
    iterations: int
    """Batches per evaluation."""
    micro_batches: int | None = None
    """Micro-batches of a rank per batch; None: as many as --eval-global-batch-size implies."""

    def batches(self) -> PerChunk[Iterator[Any]]:
        """Return an iterator over its micro-batches, starting at the first."""
        batches = _endless if self.micro_batches is None else _whole
        return per_chunk([batches(loader) for loader in self.loaders])


@dataclass(frozen=True)
class Batches:
    """All that a run reads."""

    train: Any
    """An iterator, `PerChunk`; None if nothing is left to train."""
    valid: list[EvaluationSet]
    test: list[EvaluationSet]

    def skip(self, count: int) -> None:
        """Skip micro-batches of the training data."""
        for batches in self.train if isinstance(self.train, list) else [self.train]:
            if batches is not None:
                for _ in range(count):
                    next(batches)


def build_batches(args: argparse.Namespace, say: Callable[[str], None], *, chunks: int) -> Batches:
    """Build datasets and iterators. Collective.

    Args:
        say: prints a line for the user on rank 0.
        chunks: number of model chunks on this rank.
    """
    stages = [None] if chunks == 1 else list(range(chunks))
    built = [run_datasets(args, say, vp_stage=stage) for stage in stages]
    evaluates = (args.eval_iters or args.full_validation) and has_data(args, "valid")
    titles = _titles(args, len(built[0].valid)) if evaluates else []
    valid = [
        _evaluation(args, title, [datasets.valid[place] for datasets in built])
        for place, title in enumerate(titles)
    ]
    test = _evaluation(args, "test", [datasets.test for datasets in built])
    is_over = args.skip_train or args.iteration >= args.train_iters
    return Batches(
        train=None if is_over else per_chunk([_training(args, d.train) for d in built]),
        valid=valid,
        test=[test] if args.eval_iters and has_data(args, "test") else [],
    )


def _training(args: argparse.Namespace, dataset: Any) -> Iterator[Any] | None:
    loader = build_pretraining_data_loader(dataset, args.consumed_train_samples)
    if loader is None:
        return None
    return _endless(loader) if args.dataloader_type == "cyclic" else _begun(loader)


def _titles(args: argparse.Namespace, count: int) -> list[str]:
    if not args.multiple_validation_sets:
        return ["validation"]
    names = args.validation_set_names or range(count)
    return [f"validation {name}" for name in names]


def _evaluation(args: argparse.Namespace, title: str, datasets: list[Any]) -> EvaluationSet:
    loaders = [build_pretraining_data_loader(dataset, 0) for dataset in datasets]
    if not args.full_validation or title == "test":
        return EvaluationSet(title, loaders, int(args.eval_iters or 0))
    own = max((len(loader) for loader in loaders if loader is not None), default=0)
    # As few as an interleaved pipeline accepts.
    micro_batches = args.pipeline_model_parallel_size if len(loaders) > 1 else 1
    return EvaluationSet(title, loaders, -(-max(gathered(own)) // micro_batches), micro_batches)


def _endless(loader: Any) -> Iterator[Any]:
    """Iterate over a loader, starting over at the end."""
    while loader is not None:
        yield from _begun(loader)


def _whole(loader: Any) -> Iterator[Any]:
    """Iterate once, then pad with fully masked batches: other ranks may have more samples.

    Routers count those too: their loads in a validation may include repeated samples.
    """
    if loader is None:
        return
    yield from _begun(loader)
    empty = loader.collate_fn([loader.dataset[0]])
    empty["loss_mask"] = torch.zeros_like(empty["loss_mask"])
    while True:
        yield empty


def _begun(loader: Any) -> Iterator[Any]:
    """Iterate over a loader, and restore the CPU generator (dropout's), from which it draws a seed.

    Its workers start with SIGTERM blocked. The signal would end a worker in which Megatron's
    `worker_init_fn` has not run yet, and torch would end the run with it.
    """
    with torch.random.fork_rng(devices=[]), held(signal.SIGTERM):
        return iter(loader)
