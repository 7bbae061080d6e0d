#!/usr/bin/env python3
"""Check that a plugin does what the rest of the program relies on: docs/own-mixer.md.

tools/check_plugin.py gated_conv.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import check

if __name__ == "__main__":
    check()
