"""Every tensor is accounted for in both directions, and no partial output is ever written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.conversions import (
    assert_same,
    folder_weights,
    from_hf,
    run,
    save_exported,
    weights,
)
from support.deletion import names_in
from support.smlp_systems import make_model
from torch import Tensor

from megatron_smlp.checkpoints.folders import TRACKER
from megatron_smlp.checkpoints.tensors import Spec
from megatron_smlp.checkpoints.torch_dist import COMMON, TorchDistCheckpoint
from megatron_smlp.checkpoints.writer import TorchDistWriter
from megatron_smlp.conversion import convert
from megatron_smlp.conversion.cli import main
from megatron_smlp.conversion.safetensors_files import SafetensorsFolder, write_folder
from megatron_smlp.errors import CheckpointError, UsageError, UserError

NORM = "model.layers.1.mixer_norm.weight"
Change = Callable[[dict[str, Tensor]], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop(NORM), f"lacks {NORM}, or their"),
    "unknown": (lambda t: t.update(stray=torch.ones(2)), "holds stray, which this model does not"),
    "shape": (lambda t: t.update({NORM: torch.ones(7)}), rf"{NORM} \[7\], which makes .* \[7\]"),
    "queries": (
        lambda t: t.update({"model.layers.0.mixer.q_proj.weight": torch.ones(3, 32)}),
        r"cannot be made from .*q_proj.weight \[3, 32\]",
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_experts": None, "moe_ffn_hidden_size": None, "num_layers": 2}
    return save_exported(make_model("transformer", **changes), tmp_path_factory.mktemp("a") / "hf")


def rewrite(source: Path, target: Path, change: Change) -> Path:
    target.mkdir()
    tensors = folder_weights(source)
    change(tensors)
    specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
    write_folder(target, specs, tensors.items(), limit=10**9)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_tensor_of_a_folder_is_named(exported: Path, tmp_path: Path, change: str):
    alter, message = CHANGES[change]
    folder = rewrite(exported, tmp_path / "changed", alter)
    with pytest.raises(UsageError, match=message):
        run(from_hf, folder, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]


@pytest.mark.usefixtures("in_one_process")
def test_an_unknown_tensor_of_a_checkpoint_is_named(exported: Path, tmp_path: Path):
    run(from_hf, exported, tmp_path / "run", checks=False)
    checkpoint = TorchDistCheckpoint(tmp_path / "run")
    with TorchDistWriter(tmp_path / "changed") as writer:
        for name, tensor in (weights(checkpoint) | {"stray": torch.ones(5)}).items():
            writer.add(name, tensor)
        writer.add_object(COMMON, [checkpoint.common])
    (tmp_path / "changed" / "model.json").write_text(json.dumps(checkpoint.flags))
    with pytest.raises(UsageError, match="stray"):
        run(convert.torch_dist_to_hf, tmp_path / "changed", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + bytes(15))
    with pytest.raises(UserError, match=r"model\.safetensors [^\n]*$"):
        SafetensorsFolder(tmp_path)


def test_views_and_scalars_are_written_for_all_to_read(tmp_path: Path):
    tensors = {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.5), "view": torch.ones(6, 4).T}
    specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
    write_folder(tmp_path, specs, tensors.items(), limit=10**9)
    assert_same(folder_weights(tmp_path), tensors)
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "others may read it too"


@pytest.mark.usefixtures("in_one_process")
def test_no_damaged_checkpoint_is_converted(exported: Path, tmp_path: Path):
    run(from_hf, exported, tmp_path / "run", checks=False)
    for path in sorted((tmp_path / "run" / "release").iterdir()):
        before = path.read_bytes()
        start = len(before) // 3
        rest = before[start + 512 :]  # longer than any gap between two tensors
        path.write_bytes(before[:start] + bytes(len(before) - start - len(rest)) + rest)
        with pytest.raises(UserError, match=path.name):
            run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf", checks=False)
        path.write_bytes(before)


def test_a_wrong_conversion_is_noticed(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Keys and values are swapped: all names and shapes are right, only the logits are wrong."""
    from megatron_smlp.conversion import names

    parts = names.OURS.in_layer[names.QKV]
    monkeypatch.setitem(names.OURS.in_layer, names.QKV, tuple(parts[i] for i in (0, 2, 1)))
    with pytest.raises(CheckpointError, match="nothing was written"):
        run(from_hf, exported, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [".", "../other/.."])
def test_what_is_read_is_not_replaced(exported: Path, tmp_path: Path, save: str):
    load = tmp_path / "run" / "hf"
    shutil.copytree(exported, load)
    (tmp_path / "run" / "other").mkdir()
    flags = ["--from", "hf", "--to", "torch_dist", "--overwrite", "--no-check"]
    with pytest.raises(UsageError, match=r"--save \S+ holds --load \S+, which would be deleted"):
        main(["--load", str(load), "--save", str(load / save), *flags])
    assert sorted(path.name for path in load.iterdir()) == sorted(
        path.name for path in exported.iterdir()
    )


def test_a_folder_is_replaced_only_on_demand(exported: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    flags = f"--from hf --to torch_dist --no-check --load {exported} --save {tmp_path}/run".split()
    with pytest.raises(UsageError, match=r"is not empty: .* --overwrite"):
        main(flags)
    assert (tmp_path / "run" / "precious").exists()
    main([*flags, "--overwrite"])
    assert names_in(tmp_path) == ["run"]
    assert not (tmp_path / "run" / "precious").exists()


def test_a_link_to_another_place_stays(exported: Path, tmp_path: Path):
    big, link = tmp_path / "big", tmp_path / "run"
    link.symlink_to(big)
    for _ in range(2):
        run(from_hf, exported, link, overwrite=big.exists(), checks=False)
    assert link.is_symlink()
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {".big.replaced.deleted"} == {"run", "big"}  # which is deleted later
    assert (big / TRACKER).is_file()


def test_where_one_stands_is_not_replaced(exported: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--from hf --to torch_dist --no-check --load {exported} --save ."
    with pytest.raises(UsageError, match=r"^--save \. must not be the current folder"):
        main(flags.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--from hf --to hf", "--to hf takes --from torch_dist"),
        ("--to hf --max-shard-size big", "--max-shard-size big"),
        ("--from hf --to torch_dist --ckpt-step 3", "--ckpt-step"),
        ("--to torch_dist --max-shard-size 1GB", "--max-shard-size"),
        ("--to torch_dist --num-experts 4", "--num-experts"),
        ("--to torch_dist --average 0", "--average 0: give 1 or more"),
    ],
)
def test_wrong_flags_are_one_line(flags: str, message: str):
    with pytest.raises(UsageError, match=message):
        main(["--load", "nowhere", "--save", "there", *flags.split()])


@pytest.mark.parametrize(
    ("flags", "holds", "message"),
    [
        ("--to hf", [], "holds no checkpoint"),
        ("--to hf", ["config.json"], "is a Hugging Face folder: give --from hf"),
        ("--from hf --to torch_dist", [], r"config\.json is missing"),
        ("--from gpt2 --to torch_dist", [TRACKER], "a Megatron checkpoint: give --from torch_dist"),
    ],
)
def test_a_folder_of_another_format(tmp_path: Path, flags: str, holds: list[str], message: str):
    for name in holds:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=message):
        main(["--load", str(tmp_path), "--save", str(tmp_path / "there"), *flags.split()])
