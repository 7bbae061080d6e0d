#!/usr/bin/env python3
"""Draw what runs logged: loss against steps, tokens, FLOPs and wall time; load of the experts.

tools/plot_runs.py runs/switch runs/base --output plots
tools/plot_runs.py runs/*/metrics.jsonl --against steps time --smooth 5
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import plot

if __name__ == "__main__":
    plot()
