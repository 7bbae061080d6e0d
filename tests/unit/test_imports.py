"""What imports pull in and what they leave alone, observed in a process of its own."""

import json
import sys
from typing import Any

import pytest
from support.launches import run_command

FLAGS = "--config configs/cpu/gmlp.yaml --mock-data --tokenizer-type NullTokenizer --vocab-size 500"
PROGRAM = f"""
import json, sys
import torch
cuda, zeros = dict(vars(torch.cuda)), torch.zeros
said = {{}}

from megatron_smlp.megatron_patches.late_compile import late_compile
with late_compile():
    import megatron_smlp.platform.cpu, megatron_smlp.options, megatron_smlp.architectures
said["replaced"] = [n for n, value in cuda.items() if vars(torch.cuda)[n] is not value]
said["replaced"] += ["torch.zeros"] * (torch.zeros is not zeros)

from pretrain_smlp import patched_arguments
patched_arguments({[*FLAGS.split(), "--dry-run"]})
said["what would be compiled"] = "megatron.core.fusions.fused_bias_geglu" in sys.modules
said["compilers"] = [n for n in ("torch._dynamo", "torch._inductor") if n in sys.modules]

# As where nothing of Megatron's is installed: ours is imported anew, and Megatron cannot be.
for name in list(sys.modules):
    if name.partition(".")[0] in ("megatron", "megatron_smlp"):
        del sys.modules[name]
sys.modules["megatron"] = None
import megatron_smlp.hf.modeling_smlp
said["exported model"] = megatron_smlp.hf.modeling_smlp.__name__
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    done = run_command([sys.executable, "-W", "ignore", "-c", PROGRAM])
    return json.loads(done.stdout.splitlines()[-1])


def test_the_exported_model_needs_no_megatron(said: dict[str, Any]):
    """It ships with the weights, and must run where only torch and transformers are installed."""
    assert said["exported model"] == "megatron_smlp.hf.modeling_smlp"


def test_the_command_starts_without_the_compiler(said: dict[str, Any]):
    """The compiler takes a third of start-up: Megatron is imported with torch.compile deferred. Our
    first operator that runs imports it, when a mixer is checked for reading later positions."""
    assert said["what would be compiled"]
    assert said["compilers"] == []


def test_importing_the_package_replaces_nothing(said: dict[str, Any]):
    """Only `apply` does: a library that imports our layers keeps an unpatched torch."""
    assert said["replaced"] == []
