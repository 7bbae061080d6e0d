#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer and write it as a Hugging Face folder.

    tools/train_tokenizer.py --input corpus/*.jsonl.gz --vocab-size 32000 --output my_tokenizer

Use it as `--tokenizer-type HuggingFaceTokenizer --tokenizer-model my_tokenizer`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.data.prepare.train_tokenizer_cli import main
from megatron_smlp.errors import run_tool

if __name__ == "__main__":
    run_tool(main)
