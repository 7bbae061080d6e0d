"""Iterators over micro-batches, from Megatron's samplers and loaders.

Training reads on from the sample behind the last checkpoint. Every evaluation begins anew, so that
all of a run read the same samples.
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

type PerChunk[T] = T | list[T]
"""One, or with interleaved pipeline stages one for each chunk of the model, as in schedules."""


@dataclass(frozen=True)
class EvaluationSet:
    """One dataset that a run is evaluated on."""

    title: str
    """`validation`, `validation NAME` or `test`."""
    loaders: list[Any]
    """torch's DataLoader of each chunk; None on a rank that reads nothing."""
    iterations: int
    """Batches of an evaluation."""
    micro_batches: int | None = None
    """Of a rank in a batch; None: as many as --eval-global-batch-size has."""

    def batches(self) -> PerChunk[Iterator[Any]]:
        """Return its micro-batches from the first one on."""
        batches = _endless if self.micro_batches is None else _whole
        return _per_chunk([batches(loader) for loader in self.loaders])


@dataclass(frozen=True)
class Batches:
    """What a run reads."""

    train: Any
    """An iterator for each chunk, as above; None where nothing is left to train."""
    valid: list[EvaluationSet]
    test: list[EvaluationSet]

    def skip(self, count: int) -> None:
        """Pass over micro-batches of the training."""
        for batches in self.train if isinstance(self.train, list) else [self.train]:
            if batches is not None:
                for _ in range(count):
                    next(batches)


def build_batches(args: argparse.Namespace, say: Callable[[str], None], *, chunks: int) -> Batches:
    """Build datasets and iterators. Collective.

    Args:
        say: prints a line for the user on rank 0.
        chunks: of the model on this rank.
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
        train=None if is_over else _per_chunk([_training(args, d.train) for d in built]),
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
    # As few as a pipeline takes.
    micro_batches = args.pipeline_model_parallel_size if len(loaders) > 1 else 1
    return EvaluationSet(title, loaders, -(-max(gathered(own)) // micro_batches), micro_batches)


def _endless(loader: Any) -> Iterator[Any]:
    """Begin anew at the end."""
    while loader is not None:
        yield from _begun(loader)


def _whole(loader: Any) -> Iterator[Any]:
    """Behind the samples of this rank, of which others have more: one that counts nothing."""
    if loader is None:
        return
    yield from _begun(loader)
    empty = loader.collate_fn([loader.dataset[0]])
    empty["loss_mask"] = torch.zeros_like(empty["loss_mask"])
    while True:
        yield empty


def _begun(loader: Any) -> Iterator[Any]:
    """Iterate over a loader, which draws a seed as it begins: from a CPU's generator of dropout.

    Its workers read on behind SIGTERM. torch would end one, and with it the run, that Megatron has
    not reached yet.
    """
    with torch.random.fork_rng(devices=[]), held(signal.SIGTERM):
        return iter(loader)


def _per_chunk[T](chunks: list[T]) -> PerChunk[T]:
    return chunks[0] if len(chunks) == 1 else chunks
