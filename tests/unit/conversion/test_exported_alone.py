"""An exported folder in an environment with torch, transformers and their dependencies only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.clean_environment import site_with
from support.conversions import run
from support.in_process import pretrained
from support.smlp_systems import make_ids
from transformers import AutoModelForCausalLM

from megatron_smlp.conversion import convert

SPARSE = "--num-experts 4 --moe-ffn-hidden-size 24"
SYSTEMS = {
    "gshard": f"--architecture transformer --num-attention-heads 4 --token-router gshard {SPARSE}",
    "amlp": "--architecture amlp --spatial-heads 2 --tiny-attention-width 8",
    "deterministic": "--architecture smlp --feature-router deterministic --num-dense-layers 2 "
    f"--num-feature-experts 4 --token-router base {SPARSE}",
    "partial": "--architecture smlp --feature-router partial --num-dense-layers 2 "
    f"--num-feature-experts 2 --num-feature-chunks 4 --token-router hash {SPARSE}",
}
SCRIPT = """
import importlib.util, json, sys
site, plan = sys.argv[1:]
sys.path.append(site)
for name in ("megatron", "megatron_smlp", "lm_eval", "tensorboard", "pytest"):
    assert importlib.util.find_spec(name) is None, name
import torch
from transformers import AutoModelForCausalLM
for folder, tokens, output in json.load(open(plan)):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(tokens).logits
        text = model.generate(tokens[:1, :5], max_new_tokens=6, do_sample=False)
    torch.save({"logits": logits, "text": text}, output)
assert "megatron_smlp" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for name, flags in SYSTEMS.items():
        with pretrained(f"{flags} --save {folder / 'run' / name} --lr 1e-1"):
            pass
        run(convert.torch_dist_to_hf, folder / "run" / name, folder / name)
    return {name: folder / name for name in SYSTEMS}


@torch.no_grad()
def test_it_needs_torch_and_transformers_alone(exported: dict[str, Path], tmp_path: Path):
    """Offline and without our package, it gives the same logits and the same continuation."""
    tokens = make_ids(2, 16) % 100
    plan = [
        (str(folder), tokens.tolist(), str(tmp_path / f"{name}.pt"))
        for name, folder in exported.items()
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    site = site_with(tmp_path / "site", "torch", "transformers")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SCRIPT, str(site), str(tmp_path / "plan.json")],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, folder in exported.items():
        there = torch.load(tmp_path / f"{name}.pt")
        here = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        # Not bitwise: matmuls are split by the number of threads and by where a file is mapped.
        torch.testing.assert_close(there["logits"], here(tokens).logits, rtol=0, atol=1e-5)
        text = here.generate(tokens[:1, :5], max_new_tokens=6, do_sample=False)
        assert torch.equal(there["text"], text), name
        assert text.shape == (1, 11)
