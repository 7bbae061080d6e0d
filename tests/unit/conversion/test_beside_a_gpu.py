"""A conversion runs on the CPU, whatever the machine has."""

import sys
from pathlib import Path

from support.launches import run_command

# Prints the environment's GPUs when torch is first looked for.
WATCHED = """
import os, sys
from megatron_smlp.conversion.cli import main

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("GPUs:", repr(os.environ.get("CUDA_VISIBLE_DEVICES")))
            raise SystemExit(0)

assert "torch" not in sys.modules
sys.meta_path.insert(0, Watch())
main(sys.argv[1:])
"""


def test_the_command_hides_gpus_before_torch_looks(tmp_path: Path):
    flags = f"--load {tmp_path} --save {tmp_path / 'out'} --to torch_dist".split()
    said = run_command([sys.executable, "-c", WATCHED, *flags], CUDA_VISIBLE_DEVICES="0").stdout
    assert said == "GPUs: ''\n"
