#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer and write it as a Hugging Face folder.

    tools/train_tokenizer.py --input corpus/*.jsonl.gz --vocab-size 32000 --output my_tokenizer

Use it as `--tokenizer-type HuggingFaceTokenizer --tokenizer-model my_tokenizer`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import train_tokenizer

if __name__ == "__main__":
    train_tokenizer()
