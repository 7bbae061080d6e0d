"""Cut JSON lines in two, document by document: none is in both parts.

python examples/study_split.py --input corpus.jsonl --train train.jsonl --valid valid.jsonl
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="JSON lines, a document a line")
    parser.add_argument("--train", type=Path, required=True, help="file to write")
    parser.add_argument("--valid", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--every", type=int, default=20, help="one document in so many goes to --valid"
    )
    options = parser.parse_args()
    counts = split(options.input, train=options.train, valid=options.valid, every=options.every)
    print(f"documents: {counts[0]} to train on, {counts[1]} to validate on", file=sys.stderr)


def split(source: Path, *, train: Path, valid: Path, every: int) -> tuple[int, int]:
    """Write both parts; return their numbers of documents."""
    counts = [0, 0]
    with (
        source.open(encoding="utf-8") as lines,
        train.open("w", encoding="utf-8") as kept,
        valid.open("w", encoding="utf-8") as held_out,
    ):
        for number, line in enumerate(lines):
            is_held_out = number % every == every - 1
            (held_out if is_held_out else kept).write(line)
            counts[is_held_out] += 1
    return counts[0], counts[1]


if __name__ == "__main__":
    main()
