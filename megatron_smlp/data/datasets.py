"""Megatron's GPT datasets, built under a cache lock, and the part of each that a run will read.

The one module of `data` that imports Megatron: training calls it, the tools do not.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_smlp.data.blending import SPLITS, Blends
from megatron_smlp.data.index_cache import exclusive_caches
from megatron_smlp.data.pairs.content import Watch
from megatron_smlp.data.pairs.indexed import open_index
from megatron_smlp.errors import DataError


@dataclass(frozen=True)
class DatasetUse:
    """The part of one dataset that a run reads."""

    split: str
    prefix: str
    samples: int
    """Samples drawn, of seq_length tokens."""
    tokens: int
    """Tokens that the split has of this dataset: one epoch."""
    epochs: float
    """Samples drawn over samples in an epoch."""


class WatchedGPTDataset(GPTDataset):
    """Megatron's dataset, with the content of the pair in the names of its caches.

    Megatron names them by the path alone, so that a dataset that grew would be read through the
    index of the old one. And every sample is read from the bytes that the run began with.
    """

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """Sample `idx`.

        Raises:
            ChangedDataError: the pair is not what it was when the run began.
        """
        self.watch.look()
        return super().__getitem__(idx)

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        """Megatron's, after what it names the caches by has been completed."""
        self.watch = Watch(self.dataset.path_prefix)
        self.unique_identifiers["content"] = self.watch.content
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda part: part.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode(), usedforsecurity=False
        ).hexdigest()
        return super()._build_document_sample_shuffle_indices()


def build_datasets(
    num_samples: Sequence[int | None],
    *,
    blends: Blends,
    config: GPTDatasetConfig,
    is_built_on_rank: Callable[[], bool],
    rank: int,
) -> list[Any]:
    """Build the train, valid and test dataset (None: not wanted); call on every rank.

    Args:
        num_samples: samples wanted of each split.
        config: with the blends in it, as `Blend.as_megatron` gives them.
        rank: the global rank; the first one holds the caches for the others.

    Raises:
        DataError: a split without a document, a cache that cannot be written, or unweighted
            datasets that do not suffice.
    """
    _check_splits(blends, config)
    builder = BlendedMegatronDatasetBuilder(
        WatchedGPTDataset, list(num_samples), is_built_on_rank, config
    )
    caches = exclusive_caches(blends.prefixes, path_to_cache=config.path_to_cache)
    with caches if rank == 0 else nullcontext():
        datasets: list[Any] = builder.build()
    for name, dataset, wanted in zip(SPLITS, datasets, num_samples, strict=True):
        _check_suffices(name, dataset, wanted)
    return datasets


def _check_splits(blends: Blends, config: GPTDatasetConfig) -> None:
    """Megatron repeats a dataset until it is long enough: for ever, where a part of it is empty."""
    if blends.whole is None:
        return
    for prefix in blends.whole.prefixes:
        count = open_index(prefix).num_sequences
        for name, share in zip(SPLITS, config.split_matrix or (), strict=True):
            if share is not None and round(share[0] * count) >= round(share[1] * count):
                raise DataError(
                    f"--split {config.split} leaves no document for {name} in {prefix!r}, which "
                    f"has {count}; set that share to 0 (validation's with --eval-iters 0), make it "
                    f"larger, or give --train-data-path and --valid-data-path"
                )


def _check_suffices(split: str, dataset: Any, wanted: int | None) -> None:
    """Megatron reads unweighted datasets once; a longer run would end in the middle."""
    if not isinstance(dataset, BlendedDataset) or wanted is None or len(dataset) >= wanted:
        return
    tokens = [member._get_num_tokens_per_epoch() for member in dataset.datasets]
    names = [member.dataset_path for member in dataset.datasets]
    weighted = " ".join(f"{count} {name}" for count, name in zip(tokens, names, strict=True))
    raise DataError(
        f"the {split} datasets have {len(dataset)} samples and are read once without weights, but "
        f"the run wants {wanted}; give weights to go on over the same data, by size: {weighted}"
    )


def dataset_uses(datasets: Sequence[Any], *, sequence_length: int) -> list[DatasetUse]:
    """Return what is read of every dataset, from the built datasets of a rank that has them."""
    uses = []
    for split, dataset in zip(SPLITS, datasets, strict=True):
        for member, samples in _members(dataset):
            tokens = member._get_num_tokens_per_epoch()
            epochs = samples * sequence_length / max(tokens, 1)
            uses.append(DatasetUse(split, str(member.dataset_path), samples, tokens, epochs))
    return uses


def _members(dataset: Any) -> list[tuple[Any, int]]:
    """Return (dataset, samples drawn from it) of a blend, of a single dataset, or of none."""
    if dataset is None:
        return []
    if isinstance(dataset, list):  # --multiple-validation-sets
        return [member for each in dataset for member in _members(each)]
    if not isinstance(dataset, BlendedDataset):
        # A run may read fewer samples than a single dataset holds.
        wanted = dataset.num_samples
        return [(dataset, len(dataset) if wanted is None else int(wanted))]
    drawn = np.bincount(dataset.dataset_index, minlength=len(dataset.datasets))
    return list(zip(dataset.datasets, drawn.tolist(), strict=True))


def use_lines(uses: Sequence[DatasetUse]) -> list[str]:
    """Return a table for the log: split, share, samples, tokens, epochs, dataset."""
    totals = {split: sum(use.samples for use in uses if use.split == split) for split in SPLITS}
    lines = [f"{'split':<6}{'share':>8}{'samples':>14}{'tokens':>17}{'epochs':>9}  dataset"]
    for use in uses:
        share = use.samples / max(totals[use.split], 1)
        lines.append(
            f"{use.split:<6}{share:>8.2%}{use.samples:>14,}{use.tokens:>17,}{use.epochs:>9.2f}"
            f"  {Path(use.prefix)}"
        )
    return lines
