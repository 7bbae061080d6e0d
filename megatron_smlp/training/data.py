"""Megatron's GPT datasets from our arguments, after the data was checked against them."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_smlp.data.tokenizers import identity_from_arguments
from megatron_smlp.data.verification import verify_for_training
from megatron_smlp.errors import UsageError


def check_data(args: argparse.Namespace) -> None:
    """Look at every dataset before anything is built.

    Raises:
        UsageError: no data, missing or damaged files, or data of another vocabulary.
    """
    if args.mock_data:
        return
    try:
        prefixes = data_prefixes(args)
        if not prefixes:
            raise UsageError(
                "--data-path is missing: give the prefix of a .bin/.idx pair that "
                "tools/preprocess_data.py wrote, or --mock-data."
            )
        identity = None if args.allow_tokenizer_mismatch else identity_from_arguments(args)
        for prefix in prefixes:
            verify_for_training(prefix, identity, vocab_size=get_tokenizer().vocab_size)
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """Every prefix of the blend, over all splits, once."""
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [blend, *(per_split or [])]
    return list(dict.fromkeys(prefix for each in blends if each for prefix in each[0]))


def train_valid_test_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """The provider that `megatron.training.pretrain` calls, on every rank.

    Args:
        num_samples: samples of seq_length tokens wanted for train, validation and test.
    """
    args = get_args()
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        partial(_reads_data, vp_stage),
        dataset_config(args),
    ).build()


# Megatron then calls the provider on every rank, not only on the first of each TP group.
train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]


def _reads_data(vp_stage: int | None) -> bool:
    """Whether this rank reads samples: the ends of the pipeline, once per TP group."""
    return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Megatron's dataset flags -> its dataset config."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
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
