"""Builds Megatron's GPT datasets from our arguments, after checking the data against them."""

from __future__ import annotations

import argparse
import contextlib
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    update_num_microbatches,
)
from megatron.training import get_tokenizer
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch.utils.data import Subset

from megatron_smlp.data.blending import blends_from_arguments
from megatron_smlp.data.datasets import build_datasets, dataset_uses, use_lines
from megatron_smlp.data.pairs.content import content_of
from megatron_smlp.data.pairs.quick_check import verify_for_training
from megatron_smlp.data.tokenizers.factory import identity_from_arguments
from megatron_smlp.errors import DataError, UsageError
from megatron_smlp.systems import READING_IDS

EVALUATION_SEED = 1234
"""Fixed seed of validation and test order: runs of all seeds and systems read the same samples."""
MOST_FILES = 65_536


def check_data(args: argparse.Namespace) -> None:
    """Verify every dataset before anything is built, and record its content for checkpoints.

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


@dataclass(frozen=True)
class Datasets:
    """The datasets of a run; None where it reads nothing, and on ranks that read no samples."""

    train: Any
    valid: list[Any]
    """One, or with --multiple-validation-sets one per prefix."""
    test: Any


def run_datasets(
    args: argparse.Namespace, say: Callable[[str], None], *, vp_stage: int | None = None
) -> Datasets:
    """Build the datasets; call on every rank, once per virtual pipeline stage.

    Args:
        say: prints a line for the user on rank 0: how much of each dataset the run will read.

    Raises:
        UsageError: the datasets do not suffice, or a split is empty.
    """
    samples = args.eval_iters * args.eval_global_batch_size
    build = partial(_build, args=args, on_rank=partial(_reads_data, args, vp_stage), say=say)
    train = None
    if not args.skip_train:
        train, *_ = build([_training_samples(args), 0, 0], splits=(0,), seed=args.seed)
    wanted = [0, None if args.full_validation else samples, samples]
    read = [place for place, count in enumerate(wanted) if count != 0]
    _, valid, test = build(wanted, splits=read, seed=EVALUATION_SEED)
    if args.rank == 0 and not args.mock_data and not vp_stage:
        for line in use_lines(dataset_uses([train, valid, test], sequence_length=args.seq_length)):
            say(line)
    sets = valid if isinstance(valid, list) else [valid]
    if not args.full_validation:
        sets = [_first(dataset, samples, Split.valid) for dataset in sets]
    return Datasets(train, sets, _first(test, samples, Split.test))


def open_many_files() -> None:
    """Raise this process's limit of open files: Megatron keeps up to twelve per prefix open, and a
    gloo group of n ranks n connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    with contextlib.suppress(ValueError, OSError):  # macOS may not grant what it allows
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _training_samples(args: argparse.Namespace) -> int:
    """Return the number of training samples from the run's first step to its last."""
    if args.train_samples:
        return _scheduled(args)[1] if args.step_batch_size_schedule else args.train_samples
    # A branch ends earlier, but must read in the order of the run that it leaves.
    end = args.explicit_flags["train_iters"] if args.branch_from else args.train_iters
    # Earlier, larger batches may have consumed more; without them the data would run out.
    rest = (end - args.iteration) * args.global_batch_size
    return max(end * args.global_batch_size, args.consumed_train_samples + rest)


def steps_left(args: argparse.Namespace) -> int:
    """Return the number of steps left until --train-samples."""
    if args.step_batch_size_schedule:
        return _scheduled(args)[0]
    return max(0, int(args.train_samples - args.consumed_train_samples)) // args.global_batch_size


def _scheduled(args: argparse.Namespace) -> tuple[int, int]:
    """Return the steps that --step-batch-size-schedule takes from here to --train-samples, and the
    samples read by then: the last batch may read past that number."""
    steps, read = 0, args.consumed_train_samples
    while read < args.train_samples:
        update_num_microbatches(read, consistency_check=False)
        read += get_current_global_batch_size()
        steps += 1
    update_num_microbatches(args.consumed_train_samples, consistency_check=False)
    return steps, int(read)


def _first(dataset: Any, count: int, split: Split) -> Any:
    """Return the first `count` samples of a dataset, which every evaluation of a run reads."""
    if dataset is None:
        return None
    first: Any = Subset(dataset, range(count))
    first.split = split  # Megatron derives the batch size from it
    return first


def _build(
    num_samples: Sequence[int | None],
    *,
    args: argparse.Namespace,
    on_rank: Callable[[], bool],
    say: Callable[[str], None],
    splits: Sequence[int],
    seed: int,
) -> list[Any]:
    """Build `splits` only, of train (0), validation (1) and test (2); None for the others."""
    config = dataset_config(args)
    config.random_seed = seed
    for name in ("split_matrix", "blend_per_split"):
        if (parts := getattr(config, name)) is not None:
            kept = [part if split in splits else None for split, part in enumerate(parts)]
            setattr(config, name, kept)
    if args.mock_data:
        builder = BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, on_rank, config)
        return builder.build()
    try:
        return build_datasets(
            num_samples,
            config=config,
            is_built_on_rank=on_rank,
            rank=args.rank,
            silence=60.0 * args.distributed_timeout_minutes,
            say=say,
        )
    except DataError as error:
        raise UsageError(str(error)) from error


def needs_every_batch(args: argparse.Namespace) -> bool:
    """Return whether every pipeline stage reads the batches.

    HASH routes by token ids, attention within documents needs their ends.
    """
    return bool(args.token_router in READING_IDS or args.reset_attention_mask)


def needs_batch(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Return whether this pipeline stage gets batches: the first and the last, others if needed."""
    return needs_every_batch(args) or bool(is_first_or_last_pipeline_stage(vp_stage))


def _reads_data(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Return whether this rank reads samples: one of each TP group."""
    return mpu.get_tensor_model_parallel_rank() == 0 and needs_batch(args, vp_stage)


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Translate Megatron's dataset flags into its dataset config."""
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
