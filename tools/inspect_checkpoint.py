#!/usr/bin/env python3
"""Inspect checkpoints, compare two, verify one: one process, no GPU.

tools/inspect_checkpoint.py show runs/first
tools/inspect_checkpoint.py diff runs/first/iter_0000100 runs/second
tools/inspect_checkpoint.py verify runs/first
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import inspect_checkpoint

if __name__ == "__main__":
    inspect_checkpoint()
