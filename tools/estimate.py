#!/usr/bin/env python3
"""Estimate what a configuration costs: parameters, FLOPs, memory and traffic of one GPU.

    tools/estimate.py --config configs/cpu/smlp_deterministic.yaml
    tools/estimate.py --config configs/paper/large/transformer.yaml --json --vocab-size 50257 \\
        --world-size 128 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import estimate

if __name__ == "__main__":
    estimate()
