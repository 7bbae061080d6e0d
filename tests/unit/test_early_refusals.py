"""What is wrong with a command line alone is said before torch is imported, in the same words."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.in_process import MINIMAL
from support.launches import run_command

from megatron_smlp.errors import UsageError
from megatron_smlp.flags import early

WRONG = {
    "--num-layrs 3": "--num-layrs is not a flag: did you mean --num-layers",
    "--token-router bas": "argument --token-router: invalid choice: 'bas'",
    "--spatial-heads many": "argument --spatial-heads: invalid int value: 'many'",
    "--keep-last 0": "--keep-last 0: give 1 or more.",
    "--peak-tflops 0": "--peak-tflops 0.0: give a positive number",
    "--lr -1": "--lr -1.0: give 0 or more.",
    "--position-embedding-type bas": "argument --position-embedding-type: invalid choice",
    "--yaml-cfg a.yaml": "--yaml-cfg is not among the flags of Megatron that are tested here",
    "--num-layers 2 --sft --allow-untested-flag rl": "--sft is not among",
    "--config {folder}/unknown.yaml": "unknown.yaml:2: unknown key 'token_rooter'",
    "--config {folder}/choice.yaml": "argument --token-router: invalid choice: 'bas'",
    "--config {folder}/none.yaml": "none.yaml: no such file",
}
RIGHT = {
    "--lr 1e-3 --data-path 0.5 a 0.5 b",
    "--rl-partial-rollouts --no-rl-skip-bos-token "
    "--allow-untested-flag rl-partial-rollouts rl_skip_bos_token",
    "--config {folder}/right.yaml --no-seed",
    "--use-checkpoint-args --load x --no-seed",  # the seed is that of the checkpoint
}
PROGRAM = """
import json, sys
from megatron_smlp.errors import UsageError
import pretrain_smlp

class Passed(Exception): ...
def passes(*_): raise Passed
pretrain_smlp.given = passes
said = []
for line in json.load(sys.stdin):
    try:
        pretrain_smlp.main(line.split())
    except UsageError as error:
        said.append(str(error))
    except Passed:
        said.append("")
print(json.dumps([said, [name for name in ("torch", "megatron") if name in sys.modules]]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "unknown.yaml").write_text("seed: 1\ntoken_rooter: base\n")
    (tmp_path / "choice.yaml").write_text("token_router: bas\n")
    text = (
        "seed: 1\nsplit: '9, 1, 0'\ntrain-data-path: [1, a]\nbf16: false\nmoe-layer-freq: [0, 1]\n"
    )
    (tmp_path / "right.yaml").write_text(text)
    return tmp_path


def test_before_torch_and_as_the_real_parser_says_it(parse: Callable[..., Any], folder: Path):
    lines = [line.format(folder=folder) for line in (*WRONG, *RIGHT)]
    done = run_command([sys.executable, "-c", PROGRAM], stdin=json.dumps(lines))
    said, imported = json.loads(done.stdout)
    assert imported == []
    for message, expected, line in zip(said, WRONG.values(), lines, strict=False):
        assert expected in message
        with pytest.raises(UsageError) as error:
            parse(line, base=MINIMAL.replace("--lr 1e-3", "") + "--architecture gmlp")
        assert str(error.value) == message
    assert said[len(WRONG) :] == [""] * len(RIGHT)


def test_the_table_of_megatrons_flags_is_that_of_its_parser(megatron: None):
    written = early.TABLE.read_text(encoding="utf-8")
    assert written == early.megatrons_table(), "run `python -m megatron_smlp.flags.early`"


def test_another_megatron_waits_for_its_parser(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(early, "version_of", lambda package: "0.19.99")
    early.refuse(["--num-layrs", "3"])


def test_a_choice_at_which_megatrons_own_parser_ends_in_a_traceback():
    with pytest.raises(UsageError, match="--attention-backend: invalid choice: 'flsh'"):
        early.refuse(["--attention-backend", "flsh"])
