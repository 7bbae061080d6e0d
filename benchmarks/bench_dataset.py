#!/usr/bin/env python3
"""Claim: reading samples never makes a training step wait.

    benchmarks/bench_dataset.py [--prefix data/books_text_document] [--samples 1000000]

Reads samples of 1,024 tokens through Megatron's GPT dataset in one process, in the shuffled order
of training, and prints samples/s. Without --prefix it makes 20 million random tokens and reads them
for several epochs. Exit code 1: fewer samples/s than required (a step on a CPU takes a few dozen).
"""

import argparse
import logging
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_smlp.data.blending import Blends, parse_blend  # noqa: E402
from megatron_smlp.data.pairs.writer import PairWriter, publish  # noqa: E402

REQUIRED_SAMPLES_PER_SECOND = 1000.0
DOCUMENTS = 20_000
TOKENS_A_DOCUMENT = 1000
VOCABULARY = 50257


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix", help="pair without .bin/.idx; default: random tokens")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--seq-length", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = args.prefix or _random_pair(Path(folder))
        began = time.monotonic()
        train = _train_dataset(prefix, args.samples, args.seq_length, Path(folder) / "cache")
        print(f"index of {len(train):,} samples built in {time.monotonic() - began:.1f} s")
        rate = _read(train, args.samples)
    print(f"{rate:,.0f} samples/s, {rate * args.seq_length / 1e6:,.1f} million tokens/s")
    return 0 if rate >= REQUIRED_SAMPLES_PER_SECOND else 1


def _random_pair(folder: Path) -> str:
    writer = PairWriter(folder / "random", dtype=np.dtype("uint16"))
    rng = np.random.default_rng(0)
    lengths = np.full(DOCUMENTS, TOKENS_A_DOCUMENT)
    ids = rng.integers(0, VOCABULARY, DOCUMENTS * TOKENS_A_DOCUMENT, dtype=np.uint16)
    writer.write(ids, lengths=lengths, sequences=np.ones(DOCUMENTS, np.int32))
    writer.finish(key="text", level="document")
    prefix = str(folder / "data")
    publish({prefix: writer}, manifest=None, manifest_path=folder / "data.json")
    return prefix


def _train_dataset(prefix: str, samples: int, seq_length: int, cache: Path) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from megatron_smlp.data.datasets import build_datasets

    logging.getLogger().setLevel(logging.WARNING)
    blends = Blends(parse_blend([prefix], source="--prefix"))
    tokenizer = SimpleNamespace(
        eod=VOCABULARY - 1, pad=-1, vocab_size=VOCABULARY, unique_identifiers=OrderedDict(kind="x")
    )
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        **blends.as_megatron(),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return build_datasets([samples, 0, 0], config=config, is_built_on_rank=lambda: True, rank=0)[0]


def _read(dataset: Any, samples: int) -> float:
    """Return samples per second."""
    began = time.monotonic()
    for number in range(samples):
        dataset[number]
    return samples / (time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
