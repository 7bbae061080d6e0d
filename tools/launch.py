#!/usr/bin/env python3
"""Start a training on this machine, and restart it when it fails: what examples/*.sh call.

tools/launch.py one-node pretrain_smlp.py --config configs/cpu/gmlp.yaml ...
tools/launch.py several-nodes pretrain_smlp.py --config ...   # with NNODES, MASTER_ADDR, ... set
tools/launch.py serve 29500                                   # the store of RENDEZVOUS=server
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import launch

if __name__ == "__main__":
    launch()
