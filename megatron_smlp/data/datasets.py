"""Build Megatron's GPT datasets under a cache lock, and list the part of each that a run will read.

This module imports Megatron: training calls it, the tools do not.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_smlp.data.blending import SPLITS, Blend
from megatron_smlp.data.index_cache import cache_folders, exclusive_caches
from megatron_smlp.data.pairs.content import Watch
from megatron_smlp.data.pairs.indexed import in_parts, open_index
from megatron_smlp.durable import text_of
from megatron_smlp.errors import DataError, UnlikeRanksError
from megatron_smlp.first_rank import first_rank_first, telling


@dataclass(frozen=True)
class DatasetUse:
    """The part of one dataset that a run reads."""

    split: str
    prefix: str
    samples: int
    """Samples drawn, of seq_length tokens each."""
    tokens: int
    """Tokens of this dataset in the split: one epoch."""
    epochs: float
    """Samples drawn divided by samples in an epoch."""


class WatchedGPTDataset(GPTDataset):
    """Megatron's dataset, whose caches are named by the content of the pair instead of its path.

    By its path, a dataset that has grown would be read through the old index, and machines that
    keep it under paths of their own could not share one. This class also makes sure that the pair
    is still what the run began with.
    """

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """Return sample `idx`.

        Raises:
            ChangedDataError: the pair is not what it was when the run began.
        """
        self.watch.look()
        return super().__getitem__(idx)

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        """Name the caches by the pair's content, then do as Megatron does.

        The name also leaves out the tokenizer, which no index depends on: its path may differ
        between machines, and that of GPT-2's two files is another one in each process.
        """
        self.watch = Watch(self.dataset.path_prefix)
        del self.unique_identifiers["dataset_path"], self.unique_identifiers["tokenizer"]
        self.unique_identifiers["content"] = self.watch.content
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda part: part.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode(), usedforsecurity=False
        ).hexdigest()
        return super()._build_document_sample_shuffle_indices()


class UnhurriedBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's builder without its barriers, for ranks that `first_rank_first` has ordered."""

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: Any, sizes_per_dataset: list[list[int]]
    ) -> list[list[Any]]:
        with ThreadPoolExecutor(self.config.num_dataset_builder_threads) as pool:
            by_prefix = pool.map(
                lambda prefix, sizes: self._build_megatron_dataset_splits(prefix, split, sizes),
                prefixes,
                sizes_per_dataset,
            )
            return [list(datasets) for datasets in zip(*by_prefix, strict=True)]

    def _build_megatron_dataset_splits(
        self, dataset_path: str | None, split: Any, sizes: list[int], *_: bool
    ) -> list[Any]:
        return super()._build_megatron_dataset_splits(dataset_path, split, sizes, False)

    @staticmethod
    def build_generic_dataset(
        cls: Any, is_built_on_rank: Callable[[], bool], _: bool, *args: Any
    ) -> Any:
        """Return `cls(*args)` on ranks that read it."""
        return BlendedMegatronDatasetBuilder.build_generic_dataset(
            cls, is_built_on_rank, False, *args
        )


def build_datasets(
    num_samples: Sequence[int | None],
    *,
    config: GPTDatasetConfig,
    is_built_on_rank: Callable[[], bool],
    rank: int,
    silence: float = 60.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[Any]:
    """Build the train, valid and test datasets (None if not wanted); call on every rank.

    Args:
        num_samples: number of samples wanted from each split.
        config: includes the blends, as returned by `Blends.as_megatron`.
        rank: the global rank; rank 0 locks the caches and builds first, while the others wait.
        silence: seconds without an answer after which they give up on rank 0's machine.
        say: tells the user on rank 0 that the build takes long.

    Raises:
        DataError: a split has no token, a cache cannot be written or is not shared, unweighted
            datasets do not suffice or include one shorter than a sample.
        UnlikeRanksError: this rank does not see the cache that rank 0 wrote.
    """
    builder = UnhurriedBuilder(WatchedGPTDataset, list(num_samples), is_built_on_rank, config)
    prefixes = [prefix for _, blend, _ in _splits(config) for prefix in blend.prefixes]
    folders = cache_folders(prefixes, path_to_cache=config.path_to_cache)
    others = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
    where = f"{next(iter(folders), 'no folder')}{others}"
    what = f"building the sample index in {where}, or waiting for another run or rank to do so"
    with (
        telling(what, say),
        first_rank_first(rank, silence=silence),
        exclusive_caches(folders) if rank == 0 else nullcontext(),
    ):
        if rank == 0:  # it opens every file of every pair; all ranks would see the same
            _check_splits(config, num_samples)
        try:
            datasets: list[Any] = builder.build()
        except Exception as error:
            if rank != 0 and isinstance(error, FileNotFoundError):
                raise UnlikeRanksError(
                    f"the sample index that rank 0 made in {where} is not there for rank {rank}: "
                    "give --data-cache-path with a folder that all machines share"
                ) from None
            if not isinstance(error.__cause__, OSError):  # as Megatron raises it on rank 0
                raise
            raise DataError(
                f"the sample index cannot be cached in {where} ({text_of(error.__cause__)}); give "
                f"another folder with --data-cache-path"
            ) from None
        for name, dataset, wanted in zip(SPLITS, datasets, num_samples, strict=True):
            _check_suffices(name, dataset, wanted)
    return datasets


def _check_splits(config: GPTDatasetConfig, num_samples: Sequence[int | None]) -> None:
    """Refuse a dataset with an empty part, which Megatron would repeat forever to fill a split, and
    one shorter than a sample that Megatron reads only once: whole, or without weights."""
    wanted = dict(zip(SPLITS, num_samples, strict=True))
    for name, blend, share in _splits(config):
        for prefix in blend.prefixes:
            index = open_index(prefix)
            first, last = (round(edge * index.num_sequences) for edge in share)
            tokens = len(index.tokens_of(first, last)) if first < last else 0
            if not tokens:
                raise DataError(
                    f"--split {config.split} leaves no token for {name} in {prefix!r}, which "
                    f"has {index.num_sequences} documents; set that share to 0 (validation's with "
                    f"--eval-iters 0), make it larger, or give --train-data-path and "
                    f"--valid-data-path"
                )
            is_whole = wanted[name] is None
            is_read_once = is_whole or _is_read_once(name, blend, config)
            if is_read_once and tokens <= config.sequence_length:
                how = "with --full-validation" if is_whole else "without weights"
                raise DataError(
                    f"{prefix!r} has {tokens} tokens for {name}, but a sample takes "
                    f"{config.sequence_length} + 1: {how} each dataset is read once; "
                    f"omit it, merge it into another one (tools/merge_datasets.py), "
                    f"{'' if is_whole else 'give weights, '}or make the split's share larger"
                )


def _splits(config: GPTDatasetConfig) -> Iterator[tuple[str, Blend, tuple[float, float]]]:
    """Yield the name of each split that is built, its blend, and its share of each dataset."""
    if config.blend is not None:
        for name, share in zip(SPLITS, config.split_matrix, strict=True):
            if share is not None:
                yield name, Blend(*config.blend), share
    else:
        for name, blend in zip(SPLITS, config.blend_per_split, strict=True):
            if blend is not None:
                yield name, Blend(*blend), (0.0, 1.0)


def _is_read_once(name: str, blend: Blend, config: GPTDatasetConfig) -> bool:
    """Return whether Megatron joins datasets by size, and so reads each of them once."""
    is_apart = name == "valid" and config.multiple_validation_sets and config.blend is None
    return blend.weights is None and len(blend.prefixes) > 1 and not is_apart


def _check_suffices(split: str, dataset: Any, wanted: int | None) -> None:
    """Refuse a run that is longer than its unweighted datasets, which Megatron reads only once."""
    if not isinstance(dataset, BlendedDataset) or wanted is None or len(dataset) >= wanted:
        return
    tokens = [member._get_num_tokens_per_epoch() for member in dataset.datasets]
    names = [member.dataset_path for member in dataset.datasets]
    weighted = " ".join(f"{count} {name}" for count, name in zip(tokens, names, strict=True))
    raise DataError(
        f"the {split} datasets have {len(dataset)} samples and are read once without weights, but "
        f"the run needs {wanted}; give weights to repeat the data, by size: {weighted}"
    )


def dataset_uses(datasets: Sequence[Any], *, sequence_length: int) -> list[DatasetUse]:
    """Return what a run reads of every dataset, from the built datasets of a rank that has them."""
    uses = []
    for split, dataset in zip(SPLITS, datasets, strict=True):
        for member, samples in _members(dataset):
            tokens = member._get_num_tokens_per_epoch()
            epochs = samples * sequence_length / max(tokens, 1)
            uses.append(DatasetUse(split, str(member.dataset_path), samples, tokens, epochs))
    return uses


def _members(dataset: Any) -> list[tuple[Any, int]]:
    """Return (dataset, samples drawn from it) pairs for a blend, a single dataset, or none."""
    if dataset is None:
        return []
    if isinstance(dataset, list):  # --multiple-validation-sets
        return [member for part in dataset for member in _members(part)]
    if not isinstance(dataset, BlendedDataset):
        # A run may read fewer samples than a single dataset holds.
        wanted = dataset.num_samples
        return [(dataset, len(dataset) if wanted is None else int(wanted))]
    drawn = np.zeros(len(dataset.datasets), dtype=np.int64)
    for part in in_parts(dataset.dataset_index):  # bincount copies it, 8 bytes per sample
        drawn += np.bincount(part, minlength=len(drawn))
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
