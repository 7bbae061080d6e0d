"""tools/inspect_checkpoint.py on real checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import checkpoint_tensors, flip_a_bit

from megatron_smlp.checkpoints.folders import iteration_folder
from megatron_smlp.checkpoints.inspect_cli import main
from megatron_smlp.checkpoints.inspection import differences
from megatron_smlp.checkpoints.writer import TorchDistWriter


def answer(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == code
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def test_show_has_every_tensor_with_its_norm(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
):
    shown = answer(capsys, "show", finished_run)
    assert shown["iteration"] == 6
    assert shown["model"]["architecture"] == "gmlp"
    assert shown["layout"]["world_size"] == 1
    assert shown["tokenizer"]["tokenizer_type"] == "NullTokenizer"
    assert "--ffn-hidden-size 16" in shown["command_line"]
    tensors = checkpoint_tensors(finished_run, 6)
    assert {row["name"] for row in shown["tensors"]} == set(tensors)
    for row in shown["tensors"]:
        assert row["norm"] == pytest.approx(float(tensors[row["name"]].double().norm()))
        assert row["shape"] == list(tensors[row["name"]].shape)
    assert main(["show", str(finished_run)]) == 0
    assert "embedding.word_embeddings.weight  shape [100, 8]" in capsys.readouterr().out


def test_diff_is_by_tensor(finished_run: Path, capsys: pytest.CaptureFixture[str]):
    first, second = (iteration_folder(finished_run, n) for n in (2, 6))
    assert answer(capsys, "diff", first, first)["differences"] == []
    rows = {
        row["name"]: row for row in answer(capsys, "diff", first, second, code=1)["differences"]
    }
    before, after = (checkpoint_tensors(finished_run, n) for n in (2, 6))
    assert set(rows) == {name for name in before if not torch.equal(before[name], after[name])}
    name = "embedding.word_embeddings.weight"
    gap = (before[name].double() - after[name].double()).abs().max()
    assert rows[name]["max_abs"] == pytest.approx(float(gap))


def test_verify_names_what_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]):
    assert answer(capsys, "verify", run)["problems"] == []
    flip_a_bit(iteration_folder(run, 6) / "__0_0.distcp")
    problems = answer(capsys, "verify", run, code=1)["problems"]
    assert problems == ["__0_0.distcp is not what was written"]
    assert answer(capsys, "verify", iteration_folder(run, 4))["problems"] == []


def test_diff_sees_a_type_and_knows_nan(tmp_path: Path):
    values = torch.tensor([1.0, float("nan")])
    for name, dtype in (("one", torch.float32), ("other", torch.bfloat16)):
        with TorchDistWriter(tmp_path / name) as writer:
            writer.add("weight", values.to(dtype))
    one, other = tmp_path / "one", tmp_path / "other"
    assert not list(differences(one, one))
    [row] = differences(one, other)
    assert row["dtypes"] == ["float32", "bfloat16"]
