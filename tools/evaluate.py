#!/usr/bin/env python3
"""Evaluate zero-shot tasks or perplexity of a checkpoint, in any layout, or an exported model.

    tools/evaluate.py --checkpoint runs/first --tasks copa,piqa --data-dir tasks
    torchrun --nproc-per-node 4 tools/evaluate.py --checkpoint runs/first \\
        --tensor-model-parallel-size 2 --tasks hellaswag
    tools/evaluate.py --hf runs/first/hf --tasks winogrande
    tools/evaluate.py --checkpoint runs/first --data-path data/valid_text_document
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path.pop(0)  # this file would hide the package evaluate, which lm-eval imports
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import evaluate

if __name__ == "__main__":
    evaluate()
