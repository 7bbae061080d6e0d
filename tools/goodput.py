#!/usr/bin/env python3
"""What share of its time a run gets on, for how often it fails and saves, and the best interval.

tools/goodput.py --save-seconds 20 --restart-seconds 120
tools/goodput.py --save-seconds 20 --run runs/first --gpus 64 --mtbf-hours 20000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import goodput

if __name__ == "__main__":
    goodput()
