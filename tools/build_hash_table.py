#!/usr/bin/env python3
"""Build a balanced table for `--token-router hash` from the token counts of a corpus.

tools/build_hash_table.py --data-path data/books_text_document --num-experts 8 --output hash.json
pretrain_smlp.py --token-router hash --num-experts 8 --hash-table hash.json ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import build_hash_table

if __name__ == "__main__":
    build_hash_table()
