"""Plugins in real runs: all of smlp-check, what a layout reveals, an export without us."""

import json
import math
import sys
from pathlib import Path

import pytest
from support.launches import REPOSITORY, run_command

from megatron_smlp.checking.runs import SIZES, Runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CONV = REPOSITORY / "plugins" / "gated_conv.py"
UNSUMMED = """
from megatron_smlp.plugins import TokenMixer, ones, register

@register("scaled")
class Scaled(TokenMixer):
    def build(self, width, length):
        self.scale = self.parameter(1, cut=None, init=ones)

    def forward(self, value):
        return self.scale.weight * value.cumsum(1)

register.architecture("scaled", mixer="scaled")
"""
BESIDE = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("megatron", "megatron_smlp"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(2, 26).view(2, 12)
mask = torch.ones_like(ids)
mask[0, :5] = 0
padded = model(ids, attention_mask=mask).logits[0, 5:]
assert torch.equal(padded, model(ids[:1, 5:]).logits[0])
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
assert torch.equal(again(ids).logits, model(ids).logits)
"""


WATCHED = """
from pathlib import Path
import torch
from megatron_smlp.plugins import register
from megatron_smlp.training.events import Listener

@register.listener
class Watch(Listener):
    def stepped(self, outcome):
        with Path({log!r}).open("a") as log:
            print("stepped", outcome.iteration, file=log)

@register.update
def halve(models, *, skipped):
    with Path({log!r}).open("a") as log:
        print("updated", skipped, file=log)
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.zero_()

@register.schedule
def falling(done):
    return 1 - done
"""


@pytest.mark.parametrize(
    "files",
    [
        *("plugins/aft.py", "plugins/causal_rn.py", "plugins/gated_conv.py plugins/conv_first.py"),
        *("plugins/last_tokens.py", "plugins/threshold.py", "tests/support/mixed_plugin.py"),
    ],
)
def test_plugins_pass_all_checks(files: str, tmp_path: Path):
    command = [sys.executable, "tools/check_plugin.py", *files.split()]
    said = run_command(command, seconds=900).stdout
    assert "checks passed" in said
    assert "TP 2" in said


def test_a_gradient_of_a_part_is_seen_by_a_layout(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    path = tmp_path / "scaled.py"
    path.write_text(UNSUMMED, encoding="utf-8")
    runs = Runs(
        "scaled", plugins=[str(path)], model=["--architecture", "scaled"], folder=tmp_path / "runs"
    )
    seed, resume, split, *_ = runs.checks()
    assert (seed().advice, resume().advice) == ("", "")
    assert "results depend on the layout" in split().advice


def test_an_export_needs_torch_and_transformers_alone(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    runs = Runs(
        "gated_conv", plugins=[str(CONV)], model=["--architecture", "gated_conv"], folder=tmp_path
    )
    steps = list(runs.checks())
    assert steps[0]().passed
    assert steps[-2]().passed  # the export
    folders = [str(tmp_path / "exported"), str(tmp_path / "again")]
    run_command([sys.executable, "-c", BESIDE, *folders], cwd=tmp_path)


def test_what_a_plugin_does_in_a_training(tmp_path: Path):
    """Each step runs updates, then listeners; with zero weights all tokens are equally likely."""
    path, log = tmp_path / "watched.py", tmp_path / "log"
    path.write_text(WATCHED.format(log=str(log)), encoding="utf-8")
    flags = "--architecture gmlp --train-iters 2 --bf16 --nonfinite-loss skip"
    command = [sys.executable, "pretrain_smlp.py", "--plugin", str(path), *SIZES.split()]
    command += [*flags.split(), "--log-dir", str(tmp_path), "--platform", "cpu"]
    run_command(command)
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines == [f"{what} {it}" for step in (1, 2)
                     for what, it in (("updated", False), ("stepped", step))]  # fmt: skip
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert steps[1]["loss"] == pytest.approx(math.log(256), abs=1e-3) != steps[0]["loss"]
    assert [step["learning_rate"] for step in steps] == pytest.approx([2e-3, 1e-3])
