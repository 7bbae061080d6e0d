"""Scores of a checkpoint under torchrun, in every layout, match those of one process."""

import json
from pathlib import Path

import pytest
import torch
from evaluation_helpers import EXAMPLES, LENGTH
from support.cover import selected, slow_unless_in
from support.evaluations import evaluate_all
from support.in_process import pretrained
from support.launches import launch_calls

SMALL = 1e-4
SIZES = f"--seq-length {LENGTH} --num-layers 4 --lr 3e-2 --init-method-std 0.2 --train-iters 2"
EXPERTS = "--num-experts 4 --moe-token-dispatcher-type alltoall"
SYSTEMS = {
    "gmlp": "--architecture gmlp --spatial-heads 2",
    "smlp": "--architecture smlp --num-dense-layers 2 --feature-router partial "
    f"--num-feature-experts 2 {EXPERTS} --token-router base",
    "hash": f"--architecture transformer --num-attention-heads 4 {EXPERTS} --token-router hash",
}
TP, PP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "gmlp": {
        "dp2": "",
        "tp2": TP,
        "tp2_sp": f"{TP} --sequence-parallel",
        "pp2_interleaved": f"{PP} --num-layers-per-virtual-pipeline-stage 1",
    },
    "smlp": {
        "tp2_sp": f"{TP} --sequence-parallel",
        "pp2": PP,
        "ep2": "--expert-model-parallel-size 2",
    },
    "hash": {"pp2": PP, "ep2": "--expert-model-parallel-size 2"},
}
CASES = [(system, layout) for system, layouts in LAYOUTS.items() for layout in layouts]
# One layout for each way to split a model.
FAST = [("gmlp", "tp2"), ("smlp", "ep2"), ("hash", "pp2")]


@pytest.fixture(scope="module")
def folder(
    request: pytest.FixtureRequest,
    tasks: Path,
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Write samples to `system/layout.jsonl`, and those of one process to `system/one.jsonl`."""
    made: Path = tmp_path_factory.mktemp("layouts")

    def command(system: str, layout: str, flags: str) -> list[str]:
        argv = (
            f"--checkpoint {made}/{system} --tasks copa,piqa --data-dir {tasks} "
            f"--samples {made}/{system}/{layout}.jsonl {flags}"
        )
        return argv.split()

    for system, flags in SYSTEMS.items():
        text = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"
        with pretrained(f"{SIZES} {flags} {text} --save {made / system} --eval-iters 0"):
            pass
        evaluate_all([command(system, "one", "")])
        torch.distributed.destroy_process_group()
    asked = sorted(selected(request, "system", "layout"))
    commands = [command(system, layout, LAYOUTS[system][layout]) for system, layout in asked]
    launch_calls(evaluate_all, commands, processes=2, log=made / "launch.log")
    return made


def samples(path: Path) -> list[tuple[str, int, list[float]]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["task"], line["doc_id"], line["loglikelihoods"]) for line in lines]


@pytest.mark.parametrize(("system", "layout"), slow_unless_in(FAST, CASES))
def test_a_layout_changes_no_score(folder: Path, system: str, layout: str):
    ours = samples(folder / system / f"{layout}.jsonl")
    theirs = samples(folder / system / "one.jsonl")
    assert len(ours) == len(theirs) == 2 * EXAMPLES
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine[:2] == expected[:2]
        assert mine[2] == pytest.approx(expected[2], abs=SMALL), mine[:2]
    assert len({round(value, 2) for *_, values in ours for value in values}) > EXAMPLES
