"""The commands of docs/evaluation.md as users type them: lm_eval, tools/evaluate.py, serve.py."""

import json
from pathlib import Path

import pytest
import torch
from evaluation_helpers import SYSTEMS, Run, trained
from support.evaluations import evaluate_all
from support.language_models import save_language_model
from support.smlp_systems import LONGEST

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation import cli

LENGTH = 64


@pytest.fixture(scope="module")
def long_run(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train with room for every example: local-completions and `hf` truncate differently."""
    flags = f"{SYSTEMS['partial']} --seq-length {LENGTH} --max-position-embeddings {LENGTH}"
    return trained(flags, tokenizer, tmp_path_factory.mktemp("long"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--checkpoint {0}", "--tasks .* --data-path"),
        ("--hf {0} --tasks copa --seq-length 9", "--seq-length"),
        ("--hf {0} --tasks copa --breakdown", "--breakdown requires --data-path"),
        ("--hf {0} --data-path x --data-dir y", "--data-dir y"),
        ("--checkpoint {0} --data-path x --device cpu", "--device cpu"),
        ("--hf {0} --data-path x --bf16", "--bf16"),
        ("--hf {0} --tasks copa --limit 0", "--limit 0"),
        ("--hf {0} --data-path x --output {0}/a/b", "--output {0}/a/b"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, flags: str, named: str):
    with pytest.raises(UsageError, match=named.format(tmp_path)):
        cli.parse(flags.format(tmp_path).split())


def test_what_an_exported_folder_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_language_model(tmp_path, "smlp_deterministic")
    options, _ = cli.parse(f"--hf {folder} --data-path x --seq-length {LONGEST + 1}".split())
    with pytest.raises(UsageError, match=f"--seq-length {LONGEST + 1}: --hf .* has {LONGEST} pos"):
        cli.evaluate(options, [])
    options, _ = cli.parse(f"--hf {folder} --tasks copa --device xpu".split())
    with pytest.raises(UsageError, match="--device xpu cannot be used"):
        cli._harness_model(options, [])
    options, _ = cli.parse(f"--hf {folder} --data-path x".split())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process: omit torchrun"):
        cli.evaluate(options, [])


def test_the_perplexity_of_an_exported_folder_is_that_of_its_checkpoint(
    long_run: Run, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    models = {"--checkpoint": long_run.checkpoint, "--hf": long_run.exported}
    outputs = [tmp_path / f"perplexity{flag}.json" for flag in models]
    commands = [
        [*f"--data-path {data} --stride 16 --output {output}".split(), flag, str(model)]
        for output, (flag, model) in zip(outputs, models.items(), strict=True)
    ]
    half = ["--suffix-from", "0.5", "--seq-length", "32", "--limit", "2"]
    outputs.append(tmp_path / "half.json")
    commands.append([*commands[1], *half, "--output", str(outputs[2])])
    evaluate_all(commands)
    torch.distributed.destroy_process_group()
    assert capfd.readouterr().out.count("suffix perplexity: ") == 3
    ours, theirs, some = (json.loads(output.read_text(encoding="utf-8")) for output in outputs)
    assert (some["suffix_from"], some["seq_length"], some["limit"]) == (16, 32, 2)
    assert (ours.pop("checkpoint"), ours.pop("iteration")) == (str(long_run.checkpoint), 3)
    assert theirs.pop("hf") == str(long_run.exported)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value == ours[name] or value == pytest.approx(ours[name], rel=1e-5), name
