"""Corpora and flags that several test files use."""

import argparse
import bz2
import contextlib
import gzip
import json
import lzma
import random
import resource
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_smlp.data.blending import Blends
from megatron_smlp.data.prepare.preprocess_cli import build_parser
from megatron_smlp.data.prepare.preprocessing import Summary

ROOT = Path(__file__).resolve().parents[3]
PYTHON = sys.executable
LENGTH = 32
"""Tokens per sample of `dataset_config`."""
WORDS = [
    *("the", "a", "of", "and", "sea", "ship", "whale", "captain's", "don't", "12", "3.14"),
    *("<|endoftext|>", "x\ty", "under\u00a0way", "caf\u00e9", "cafe\u0301", "na\u00efve"),
    *("\u201cquoted\u201d", "\u2014", "\u65e5\u672c\u8a9e", "\u0440\u0443\u043a\u0430"),
    *("\U0001f642", "\u0627\u0644\u0639"),
]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Return texts of 1 to 60 words in several scripts, with odd white space."""
    rng = random.Random(seed)
    gaps = [" ", " ", " ", "  ", "\n", "\n\n", ". ", ", ", "\r\n"]
    documents = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, 60))
        documents.append("".join(word + rng.choice(gaps) for word in words))
    return documents


def write_jsonl(path: Path, documents: Sequence[str], key: str = "text") -> Path:
    with path.open("w", encoding="utf-8") as stream:
        for number, text in enumerate(documents):
            # Both spellings of a non-ASCII character occur in the wild.
            record = {"id": number, key: text}
            stream.write(json.dumps(record, ensure_ascii=bool(number % 2)) + "\n")
    return path


def _zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=1),
    ".zst": _zstd,
}
BYTE_FLAGS = ["--tokenizer-type", "ByteLevelTokenizer"]
Run = Callable[..., Summary]
"""The fixture `run`."""


def write_pair(
    run: Run, folder: Path, name: str, texts: Sequence[str], flags: Sequence[object] = BYTE_FLAGS
) -> str:
    """Preprocess texts; return the prefix of their pair."""
    run(write_jsonl(folder / f"{name}.jsonl", texts), folder / name, *flags)
    return str(folder / f"{name}_text_document")


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Refuse files beyond `limit` bytes, as a full disk does: the error names no file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def parse(*flags: object) -> argparse.Namespace:
    return build_parser().parse_args([str(flag) for flag in flags])


def megatron_tokenizer(flags: Sequence[object]) -> Any:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    args = _add_tokenizer_args(argparse.ArgumentParser()).parse_args([str(flag) for flag in flags])
    args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 0, 128, 1
    return build_tokenizer(args)


def write_with_megatron(
    prefix: Path, documents: Sequence[Sequence[str]], tokenizer: Any, *, append_eod: bool
) -> None:
    """Write like Megatron's tool: sentences without ids are dropped, EOD joins the last one."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    for sentences in documents:
        rows = [row for row in map(tokenizer.tokenize, sentences) if len(row)]
        if rows and append_eod:
            rows[-1] = [*rows[-1], tokenizer.eod]
        builder.add_document([number for row in rows for number in row], list(map(len, rows)))
    builder.finalize(f"{prefix}.idx")


def assert_same_pair(ours: Path | str, theirs: Path | str) -> None:
    for suffix in (".idx", ".bin"):
        assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()


def dataset_config(blends: Blends, cache: Path, split: str = "900,50,50") -> Any:
    """Return Megatron's configuration for a dataset of bytes."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    tokenizer = SimpleNamespace(
        eod=0, pad=1, vocab_size=512, unique_identifiers=OrderedDict(kind="bytes")
    )
    return GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        **blends.as_megatron(),
        split=split if blends.whole else None,
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
