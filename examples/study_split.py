"""Cut JSON lines in two, document by document: none is in both parts.

python examples/study_split.py --input corpus.jsonl --train train.jsonl --valid valid.jsonl
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.data.prepare.compression import DamagedInputError, text_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="JSON lines, or .gz, .zst")
    parser.add_argument("--train", type=Path, required=True, help="file to write")
    parser.add_argument("--valid", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--every", type=int, default=20, help="one document in so many goes to --valid"
    )
    options = parser.parse_args()
    try:
        counts = split(options.input, train=options.train, valid=options.valid, every=options.every)
    except (OSError, DamagedInputError) as error:
        parser.error(f"--input {options.input}: {error}")
    print(f"documents: {counts[0]} to train on, {counts[1]} to validate on", file=sys.stderr)


def split(source: Path, *, train: Path, valid: Path, every: int) -> tuple[int, int]:
    """Write both parts; return their numbers of documents."""
    counts = [0, 0]
    with train.open("wb") as kept, valid.open("wb") as held_out:
        for number, line in enumerate(lines_of(source)):
            is_held_out = number % every == every - 1
            (held_out if is_held_out else kept).write(line)
            counts[is_held_out] += 1
    return counts[0], counts[1]


def lines_of(source: Path) -> Iterator[bytes]:
    """Yield the lines of a file, which may be compressed, each with its end."""
    begun = b""
    for block in text_blocks(source):
        *lines, begun = (begun + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if begun:
        yield begun + b"\n"


if __name__ == "__main__":
    main()
