#!/usr/bin/env python3
"""Inspect, validate and split the `.bin`/`.idx` pairs that Megatron trains on.

    tools/inspect_dataset.py show data/books_text_document
    tools/inspect_dataset.py validate data/books_text_document
    tools/inspect_dataset.py split data/books_text_document --weights 0.95 0.05 --by tokens
    tools/inspect_dataset.py sample data/books_text_document --count 2 \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model my_tokenizer
    tools/inspect_dataset.py stats data/books_text_document --png lengths.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import inspect_dataset

if __name__ == "__main__":
    inspect_dataset()
