#!/usr/bin/env python3
"""Compare systems at equal FLOPs and at equal time: plan, run and report a study.

tools/study.py plan studies/smoke.yaml
tools/study.py run studies/smoke.yaml --data runs/study-data     # one worker; start several
tools/study.py status studies/smoke.yaml --data runs/study-data
tools/study.py report studies/smoke.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import study

if __name__ == "__main__":
    study()
