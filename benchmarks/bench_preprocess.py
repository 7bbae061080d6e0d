#!/usr/bin/env python3
"""Claim: preprocessing runs at 40 MB/s or more on 2 cores, 10 times a pool of tokenizers workers.

    benchmarks/bench_preprocess.py --input books.jsonl --vocab-file vocab.json \\
        --merge-file merges.txt [--megatron-tool Megatron-LM/tools/preprocess_data.py]

One run measures this tool, a pool of processes that call `tokenizers` one document at a time, and
Megatron-LM's tool if a copy is given, on the same text, and compares the bytes. The slow ones read
only the first `--peer-megabytes`. Exit code 1: a claim does not hold.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 1e6
REQUIRED_SPEED = 40.0
REQUIRED_RATIO = 10.0
REQUIRED_START_UP = 3.0

_tokenizer = None


def main() -> int:
    args = _parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peer_input = _head(args.input, folder / "head.jsonl", int(args.peer_megabytes * MEGABYTE))
        ours, start_up = _ours(args, args.input, folder / "ours")
        pool = _pool_speed(args, peer_input)
        print(f"{'':<34}{'MB/s':>8}{'ratio':>8}")
        print(f"{'this tool':<34}{ours:>8.1f}{1:>8.1f}   start-up {start_up:.1f} s")
        print(f"{'tokenizers pool, one document':<34}{pool:>8.1f}{ours / pool:>8.1f}")
        same = True
        if args.megatron_tool:
            theirs, seconds = _megatron(args, peer_input, folder)
            print(
                f"{'Megatron-LM':<34}{theirs:>8.1f}{ours / theirs:>8.1f}   in all {seconds:.1f} s"
            )
            _ours(args, peer_input, folder / "same")
            same = _same_bytes(folder / "same_text_document", folder / "megatron_text_document")
            print(f"bytes equal to Megatron-LM's: {same}")
    holds = ours >= REQUIRED_SPEED and ours >= REQUIRED_RATIO * pool
    return 0 if holds and start_up <= REQUIRED_START_UP and same else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="plain JSON Lines with `text`")
    parser.add_argument("--vocab-file", type=Path, required=True)
    parser.add_argument("--merge-file", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer-megabytes", type=float, default=15.0)
    parser.add_argument("--megatron-tool", type=Path)
    return parser.parse_args()


def _head(source: Path, target: Path, num_bytes: int) -> Path:
    with source.open("rb") as lines, target.open("wb") as out:
        for line in lines:
            out.write(line)
            if out.tell() >= num_bytes:
                break
    return target


def _flags(args: argparse.Namespace, source: Path, prefix: Path) -> list[str]:
    return [
        *("--input", str(source), "--output-prefix", str(prefix), "--append-eod"),
        *("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(args.vocab_file.resolve())),
        *("--merge-file", str(args.merge_file.resolve()), "--workers", str(args.workers)),
    ]


def _ours(args: argparse.Namespace, source: Path, prefix: Path) -> tuple[float, float]:
    """Return (MB/s from first to last document, seconds of start-up), as the tool reports them."""
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py")]
    done = subprocess.run(
        [*command, *_flags(args, source, prefix), "--overwrite"],
        capture_output=True,
        text=True,
        check=True,
    )
    match = re.search(r"([\d.]+) MB/s, start-up ([\d.]+) s", done.stdout)
    assert match, done.stdout
    return float(match[1]), float(match[2])


def _load(vocab: str, merges: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    global _tokenizer
    _tokenizer = Tokenizer(models.BPE.from_file(vocab, merges))
    _tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _encode(line: bytes) -> list[int]:
    assert _tokenizer is not None
    return _tokenizer.encode(json.loads(line)["text"]).ids


def _pool_speed(args: argparse.Namespace, source: Path) -> float:
    lines = source.read_bytes().splitlines()
    files = (str(args.vocab_file), str(args.merge_file))
    with multiprocessing.Pool(args.workers, initializer=_load, initargs=files) as pool:
        pool.map(_encode, [b'{"text": "warm"}'] * 4 * args.workers, chunksize=1)
        began = time.monotonic()
        tokens = sum(len(ids) for ids in pool.imap(_encode, lines, chunksize=1))
        seconds = time.monotonic() - began
    assert tokens
    return source.stat().st_size / MEGABYTE / seconds


def _megatron(args: argparse.Namespace, source: Path, folder: Path) -> tuple[float, float]:
    """Return (MB/s after start-up, seconds in all); it finds "gpt2" in a folder of that name."""
    model = folder / "gpt2"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    for path, name in ((args.vocab_file, "vocab.json"), (args.merge_file, "merges.txt")):
        (model / name).write_bytes(path.read_bytes())
    command = [sys.executable, str(args.megatron_tool.resolve())]
    flags = [*_flags(args, source, folder / "megatron"), "--log-interval", "1"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, *flags], cwd=folder, capture_output=True, text=True, check=True
    )
    seconds = time.monotonic() - began
    rates = re.findall(r"([\d.]+) MB/s\)", done.stderr)
    # It counts in MiB.
    return float(rates[-1]) * 2**20 / MEGABYTE, seconds


def _same_bytes(ours: Path, theirs: Path) -> bool:
    return all(
        Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()
        for suffix in (".bin", ".idx")
    )


if __name__ == "__main__":
    sys.exit(main())
