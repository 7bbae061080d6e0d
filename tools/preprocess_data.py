#!/usr/bin/env python3
"""Turn text into the `.bin`/`.idx` pairs that Megatron trains on.

    tools/preprocess_data.py --input corpus/*.jsonl.gz --output-prefix data/books \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model my_tokenizer \\
        --append-eod --workers 8

Flags and output are those of Megatron's tool; docs/data.md explains each one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import preprocess

if __name__ == "__main__":
    preprocess()
