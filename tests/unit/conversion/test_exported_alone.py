"""An exported folder in an environment with torch, transformers and their dependencies only."""

import subprocess
import sys
from pathlib import Path

import torch
from support.clean_environment import site_with
from support.conversions import from_hf, run, save_exported
from support.language_models import save_tokenizer
from support.smlp_systems import make_ids, make_model

from megatron_smlp.conversion import convert

SYSTEMS = ("gshard", "hash", "amlp", "smlp_deterministic", "smlp_partial")
SCRIPT = """
import importlib.util, os, re, sys
site, *folders = sys.argv[1:]
sys.path.append(site)
for name in ("megatron", "megatron_smlp", "lm_eval", "tensorboard", "pytest"):
    assert importlib.util.find_spec(name) is None, name
import torch
from transformers import AutoModel, AutoModelForCausalLM
tokens = torch.load("tokens.pt")
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        states, logits = inner(tokens).last_hidden_state, model(tokens).logits
        text = model.generate(tokens[:1, :5], max_new_tokens=6, do_sample=False)
    torch.save((states, logits, text), f"{folder}.pt")
    if folder == "saved":
        model.save_pretrained("again")
os.chdir("card")
[code] = re.findall("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
exec(code)
"""


@torch.no_grad()
def test_it_needs_torch_and_transformers_alone(tmp_path: Path):
    """Offline and without our package, it gives the same logits and the same continuation: exports,
    what our own class saves, as in Trainer, and what is saved from that. The card's code runs."""
    tokens = make_ids(2, 16)
    torch.save(tokens, tmp_path / "tokens.pt")
    models = {name: make_model(name) for name in SYSTEMS}
    for name, model in models.items():
        save_exported(model, tmp_path / name)
    models["saved"] = models["again"] = models["smlp_deterministic"]
    models["saved"].save_pretrained(tmp_path / "saved")
    save_tokenizer(tmp_path / "tokenizer")
    save_exported(make_model("gmlp", vocab_size=264, unpadded_vocab_size=257), tmp_path / "hf")
    named = {"tokenizer_model": str(tmp_path / "tokenizer"), "checks": False}
    run(from_hf, tmp_path / "hf", tmp_path / "run", checks=False)
    run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "card", **named)
    site = site_with(tmp_path / "site", "torch", "transformers")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SCRIPT, str(site), *models],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The" in done.stdout
    for name, model in models.items():
        states, logits, text = torch.load(tmp_path / f"{name}.pt")
        # Not bitwise: matmuls are split by the number of threads and by where a file is mapped.
        torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(states, model.model(tokens).last_hidden_state)
        here = model.generate(tokens[:1, :5], max_new_tokens=6, do_sample=False)
        assert torch.equal(text, here), name
        assert text.shape == (1, 11)
