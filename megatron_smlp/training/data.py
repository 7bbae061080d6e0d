"""Megatron's GPT datasets from our arguments, after the data was checked against them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor
from torch.utils.data import Dataset

from megatron_smlp.collectives import from_first_rank, gathered
from megatron_smlp.data.blending import blends_from_arguments
from megatron_smlp.data.datasets import build_datasets, dataset_uses, use_lines
from megatron_smlp.data.pairs.content import content_of
from megatron_smlp.data.pairs.quick_check import verify_for_training
from megatron_smlp.data.token_counts import counts_of_datasets, mixture
from megatron_smlp.data.tokenizers.factory import identity_from_arguments
from megatron_smlp.errors import DataError, UsageError
from megatron_smlp.routers.hash_table import balanced_table
from megatron_smlp.systems import READING_IDS

EVALUATION_SEED = 1234
"""Seed of the order of validation and test samples, so that runs with other seeds and systems are
compared on the same ones."""


def check_data(args: argparse.Namespace) -> None:
    """Look at every dataset before anything is built, and keep what is in each: checkpoints say it.

    Raises:
        UsageError: no data, missing or damaged files, or data of another vocabulary.
    """
    if args.mock_data:
        return
    try:
        prefixes = blends_from_arguments(args).prefixes
        if not prefixes:
            raise UsageError(
                "--data-path is missing: give the prefix of a .bin/.idx pair that "
                "tools/preprocess_data.py wrote, or --mock-data."
            )
        identity = None if args.allow_tokenizer_mismatch else identity_from_arguments(args)
        for prefix in prefixes:
            verify_for_training(prefix, identity, vocab_size=get_tokenizer().vocab_size)
            args.data_contents[prefix] = content_of(prefix)
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error


class DatasetProvider:
    """Builds the datasets; `megatron.training.pretrain` calls it on every rank.

    Args:
        say: prints a line for the user on rank 0: what the run will read of each dataset.
    """

    is_distributed = True  # Megatron then calls it on every rank, not only once per TP group

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.said = False

    def __call__(self, num_samples: list[int], vp_stage: int | None = None) -> Any:
        """Train, validation and test datasets with `num_samples` samples of seq_length tokens.

        Raises:
            UsageError: the datasets do not suffice, or a split is empty.
        """
        args = get_args()
        on_rank = partial(_reads_data, args, vp_stage)
        train, valid, test = num_samples
        if args.train_iters and not args.train_samples:
            # Samples that were read in larger batches: without these it would run out of them.
            done = getattr(args, "iteration", 0)  # Megatron sets it when it loads
            rest = (args.train_iters - done) * args.global_batch_size
            train = max(train, args.consumed_train_samples + rest)
        once = valid if args.full_validation else test  # Megatron wants as many for the test split
        datasets = [
            *self._build([train, 0, 0], on_rank, splits=(0,), seed=args.seed)[:1],
            *self._build([0, once, test], on_rank, splits=(1, 2), seed=EVALUATION_SEED)[1:],
        ]
        # Megatron refuses to read from a dataset without samples, as --eval-iters 0 makes them.
        datasets = [
            None if wanted == 0 else dataset
            for wanted, dataset in zip(num_samples, datasets, strict=True)
        ]
        if not args.mock_data:
            self._say_uses(datasets, args)
        for place, length in ((1, valid), (2, test)):
            if datasets[place] is not None and not args.full_validation:
                length *= 1 + args.base_eval_both
                # Megatron goes on behind what it has read, by the checkpoint, whatever the flags
                # of validation were until then.
                length += args.consumed_valid_samples if place == 1 else 0
                if args.start_eval_at_iter:
                    length += once  # Megatron counts one too few where that divides the interval
                length = once if args.dataloader_type == "cyclic" else length
                datasets[place] = AgainAndAgain(datasets[place], once=once, length=length)
        return datasets

    def _build(
        self,
        num_samples: list[int],
        on_rank: Callable[[], bool],
        *,
        splits: Sequence[int],
        seed: int,
    ) -> list[Any]:
        """Only these of train (0), validation (1), test (2); None in the places of the others."""
        args = get_args()
        config = dataset_config(args)
        config.random_seed = seed
        for name in ("split_matrix", "blend_per_split"):
            if (of_all := getattr(config, name)) is not None:
                kept = [part if split in splits else None for split, part in enumerate(of_all)]
                setattr(config, name, kept)
        if args.mock_data:
            builder = BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, on_rank, config)
            return builder.build()
        try:
            return build_datasets(
                num_samples,
                blends=blends_from_arguments(args),
                config=config,
                is_built_on_rank=on_rank,
                rank=args.rank,
                silence=60.0 * args.distributed_timeout_minutes,
                say=self.say,
            )
        except DataError as error:
            raise UsageError(str(error)) from error

    def _say_uses(self, datasets: list[Any], args: argparse.Namespace) -> None:
        if args.rank == 0 and not self.said:
            for line in use_lines(dataset_uses(datasets, sequence_length=args.seq_length)):
                self.say(line)
        self.said = True


class AgainAndAgain(Dataset[Any]):
    """The first samples of a dataset, over and over: every evaluation of a run reads the same.

    Megatron goes on in its validation data from one validation to the next.

    Args:
        once: samples of one evaluation.
        length: samples of all that there are in the run.
    """

    split = Split.valid  # which Megatron reads for the size of a batch

    def __init__(self, dataset: Dataset[Any], *, once: int, length: int) -> None:
        self.dataset, self.once, self.length = dataset, once, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % self.once]


def experts_of_training_data(args: argparse.Namespace) -> Tensor:
    """Return --hash-table balanced's table, of what the run trains on: each rank counts a part of
    it, or the others would wait for longer than a collective may last. Collective.

    With --split the validation's documents are counted too.

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


def may_be_padded(args: argparse.Namespace) -> bool:
    """Return whether samples may end in padding. Only full validation pads: elsewhere Megatron
    drops an incomplete last sample."""
    return bool(args.full_validation)


def needs_every_batch(args: argparse.Namespace) -> bool:
    """Return whether every pipeline stage reads the batches: HASH routes by token ids, and no
    router may count padding.
    """
    has_routers = args.token_router != "none" or args.feature_router == "partial"
    return bool(args.token_router in READING_IDS or (has_routers and may_be_padded(args)))


def needs_batch(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Return whether this pipeline stage gets batches: the ends of the pipeline, or all of it."""
    return needs_every_batch(args) or bool(is_first_or_last_pipeline_stage(vp_stage))


def _reads_data(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Return whether this rank reads samples: one of each TP group."""
    return mpu.get_tensor_model_parallel_rank() == 0 and needs_batch(args, vp_stage)


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Megatron's dataset flags -> its dataset config."""
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        **blends_from_arguments(args).as_megatron(),
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
