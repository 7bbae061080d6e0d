#!/usr/bin/env python3
"""Serve a checkpoint or an exported model as OpenAI's /v1/completions, on this machine.

tools/serve.py --checkpoint runs/first --port 8000
tools/serve.py --hf runs/first/hf
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smlp.commands import serve

if __name__ == "__main__":
    serve()
