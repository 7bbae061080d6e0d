#!/usr/bin/env python3
"""Convert a checkpoint to another format or layout: one process, no GPU, no torchrun.

tools/convert_checkpoint.py --load runs/first --save exported --to hf
tools/convert_checkpoint.py --load exported --save runs/again --from hf --to torch_dist
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import convert

if __name__ == "__main__":
    convert()
