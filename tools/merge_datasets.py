#!/usr/bin/env python3
"""Concatenate `.bin`/`.idx` pairs into one.

tools/merge_datasets.py --input shards/ --output-prefix data/all_text_document
tools/merge_datasets.py --input data/a_text_document data/b_text_document --output-prefix data/ab
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import merge_datasets

if __name__ == "__main__":
    merge_datasets()
