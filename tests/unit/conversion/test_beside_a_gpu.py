"""A conversion runs on the CPU, whatever the machine has."""

import sys
from pathlib import Path

import pytest
from support.in_process import pretrained
from support.launches import REPOSITORY, run_command
from support.smlp_systems import SYSTEMS

BESIDE_A_GPU = REPOSITORY / "tests" / "support" / "beside_a_gpu.py"
ROTARY = (
    "--architecture transformer --num-attention-heads 4 --position-embedding-type rope "
    "--train-iters 2"
)
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


@pytest.fixture(scope="module")
def rotary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("rotary")
    with pretrained(f"{ROTARY} --save {folder}"):
        return folder


@pytest.mark.slow
def test_every_conversion(rotary: Path, tmp_path: Path):
    words = [sys.executable, str(BESIDE_A_GPU), str(tmp_path), str(rotary), *SYSTEMS]
    said = run_command(words, PYTHONPATH=str(REPOSITORY / "tests")).stdout
    assert said.count("forward check: logits of") == 2 * len(SYSTEMS) + 1


def test_the_command_hides_gpus_before_torch_looks(rotary: Path, tmp_path: Path):
    flags = f"--load {rotary} --save {tmp_path / 'out'} --to torch_dist".split()
    said = run_command([sys.executable, "-c", WATCHED, *flags], CUDA_VISIBLE_DEVICES="0").stdout
    assert said == "GPUs: ''\n"
