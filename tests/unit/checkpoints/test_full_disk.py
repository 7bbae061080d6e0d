"""On a real file system without room, a run says so and goes on, or stops; nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import small_disk
from support.conversions import save_exported
from support.launches import launch_calls
from support.smlp_systems import make_model

ASYNC = "--async-save"
Outputs = dict[tuple[str, str], tuple[int, str]]


@pytest.fixture(scope="module")
def outputs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Run every case, each on a disk of its own; return exit codes and outputs."""
    folder, run = tmp_path_factory.mktemp("full_disk"), str(finished_run)
    dense = make_model("gmlp", num_experts=None, moe_ffn_hidden_size=None)
    sources = {"hf": str(save_exported(dense, folder / "hf")), "to hf": run}
    cases = [("stop", "", run, 1024), ("stop", ASYNC, run, 1024), ("go_on", ASYNC, run, 1024)]
    cases += [(name, "", None, 64) for name in ("write_metrics", "train_with_tensorboard")]
    cases += [("convert_without_room", *source, 64) for source in sources.items()]
    cases += [("stop_conversions", *source, 8192) for source in sources.items()]
    plan: list[dict[str, Any]] = []
    for number, (name, how, source, kilobytes) in enumerate(cases):
        disk = str(folder / f"disk{number}")
        arguments = [disk] if source is None else [disk, how, source]
        plan.append({
            "work": f"support.full_disk_cases:{name}",
            "arguments": arguments,
            "folder": disk,
            "kilobytes": kilobytes,
            "output": str(folder / f"output{number}"),
        })  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    log = folder / "log"
    launch_calls(small_disk.run_all, folder / "plan.json", processes=1, log=log)
    codes = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    if small_disk.CANNOT_MOUNT in codes:
        pytest.skip("no file system can be mounted here: neither as root nor in a user namespace")
    texts = [Path(case["output"]).read_text(encoding="utf-8") for case in plan]
    return {case[:2]: (code, text) for case, code, text in zip(cases, codes, texts, strict=True)}


def output(outputs: Outputs, name: str, how: str = "") -> str:
    code, text = outputs[name, how]
    assert code == 0, text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("how", ["", ASYNC])
def test_the_run_stops(outputs: Any, how: str):
    said = output(outputs, "stop", how)
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "iteration 4 could not be saved to " in line
    assert "No space left on device; the newest is of iteration 2" in line
    assert "--on-save-failure continue" in line


def test_the_run_goes_on(outputs: Any):
    """Its logs are on the full disk too, which is reported once per file."""
    before, after = output(outputs, "go_on", ASYNC).split("no room at all")
    for part in (before, after):
        for iteration in (4, 6):
            assert f"iteration {iteration} could not be saved" in part
        assert "iteration 6/6" in part
    assert "LOST" not in before
    assert after.count("LOST") == 2
    for name in ("metrics.jsonl", "megatron.log"):
        assert f"{name} cannot be written (No space left on device): its lines are LOST" in after


def test_metrics_lose_whole_lines_and_say_so_once(outputs: Any):
    assert output(outputs, "write_metrics").count("LOST") == 1


def test_a_run_outlives_its_tensorboard_folder(outputs: Any):
    """TensorBoard's thread may print a traceback of its own when it ends."""
    code, text = outputs["train_with_tensorboard", ""]
    assert code == 0, text
    assert text.count("LOST") == 1
    assert "iteration 80/80" in text


@pytest.mark.parametrize("kind", ["hf", "to hf"])
@pytest.mark.parametrize("case", ["convert_without_room", "stop_conversions"])
def test_no_half_output_of_a_conversion(outputs: Any, case: str, kind: str):
    code, text = outputs[case, kind]
    assert code == 0, text
