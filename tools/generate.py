#!/usr/bin/env python3
"""Continue prompts with a checkpoint, in any layout, or an exported model.

tools/generate.py --checkpoint runs/first --prompt "Once upon" --max-new-tokens 60 --seed 1
tools/generate.py --hf runs/first/hf --prompts-file prompts.txt
tools/generate.py --checkpoint runs/first
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import generate

if __name__ == "__main__":
    generate()
