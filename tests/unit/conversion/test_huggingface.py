"""An exported folder computes what the Megatron model computes from the same checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.in_process import build_model
from support.launches import launch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_smlp.conversion.huggingface import export, huggingface_config
from megatron_smlp.conversion.names import HeadShape, join_qkv, split_qkv
from megatron_smlp.conversion.torch_dist import TorchDistCheckpoint
from megatron_smlp.errors import UsageError

BASE = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 90 --num-layers 3 --hidden-size 32 "
    "--ffn-hidden-size 96 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 "
    "--global-batch-size 2 --train-iters 3 --lr 1e-2 --eval-iters 0 --num-workers 0 "
    "--attention-dropout 0 --hidden-dropout 0"
)
MOE = "--num-experts 4"
CAPACITY = "--moe-eval-capacity-factor 1"
SYSTEMS = {
    "transformer": "--architecture transformer",
    "transformer_switch": f"{MOE} --token-router switch --moe-layer-freq 2",
    "transformer_gshard": f"{MOE} --token-router gshard {CAPACITY}",
    "transformer_hash": f"{MOE} --token-router hash --hash-seed 3",
    "gmlp": "--architecture gmlp --spatial-heads 3",
    "smlp": (
        "--architecture smlp --num-dense-layers 1 --feature-router deterministic "
        f"--num-feature-experts 4 {MOE} --token-router base --moe-ffn-hidden-size 40"
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every system after three real steps."""
    folder: Path = tmp_path_factory.mktemp("export")
    runs = {name: f"{BASE} {flags} --save {folder / name}/run" for name, flags in SYSTEMS.items()}
    launch(runs, processes=1, folder=folder)
    return folder


def load_into_megatron(model: Any, checkpoint: TorchDistCheckpoint) -> None:
    """By name; Megatron keeps each local expert as a module of its own."""
    state = model.state_dict()
    for name, tensor in checkpoint.tensors():
        if ".experts.experts." in name:
            for expert, weight in enumerate(tensor):
                key = name.replace(".experts.experts.", f".experts.local_experts.{expert}.")
                state[key] = weight
        else:
            state[name] = tensor
    model.load_state_dict(state)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.usefixtures("megatron")
def test_exported_logits_are_those_of_megatron(
    trained: Path, system: str, parse: Callable[..., Any], tmp_path: Path
) -> None:
    run = trained / system / "run"
    model = build_model(parse(SYSTEMS[system].replace(CAPACITY, ""), base=BASE))
    load_into_megatron(model, TorchDistCheckpoint(run))
    folder = export(run, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.randint(90, (3, 13))
    positions = torch.arange(13).expand_as(tokens)
    with torch.no_grad():
        expected: Tensor = model(tokens, positions, None)
        torch.testing.assert_close(exported(tokens).logits, expected, rtol=0, atol=1e-5)


def test_an_exported_model_drops_no_token_in_evaluation(trained: Path) -> None:
    flags = TorchDistCheckpoint(trained / "transformer_gshard" / "run").flags
    assert flags["moe_eval_capacity_factor"] == 1
    assert huggingface_config(flags).moe_eval_capacity_factor is None


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_every_tensor_is_accounted_for(trained: Path, tmp_path: Path, change: str) -> None:
    """A checkpoint that lacks a tensor of the model, or has one of another shape, is refused."""
    checkpoint = TorchDistCheckpoint(trained / "gmlp" / "run")
    flags = dict(checkpoint.flags)
    flags |= {"num_layers": 4} if change == "missing" else {"seq_length": 17}
    named = "layers.3" if change == "missing" else "spatial.bias is [3, 16]"
    from megatron_smlp.conversion.huggingface import fill
    from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

    with pytest.raises(UsageError, match=named.replace("[", r"\[").replace("]", r"\]")):
        fill(SMLPForCausalLM(huggingface_config(flags)), checkpoint)


def test_unknown_tensor_is_refused(trained: Path) -> None:
    """Fewer layers than the checkpoint has: its last layer has no place."""
    from megatron_smlp.conversion.huggingface import fill
    from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

    checkpoint = TorchDistCheckpoint(trained / "gmlp" / "run")
    config = huggingface_config({**checkpoint.flags, "num_layers": 2})
    with pytest.raises(UsageError, match=r"decoder\.layers\.2\..* has no place"):
        fill(SMLPForCausalLM(config), checkpoint)


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no checkpoint"):
        TorchDistCheckpoint(tmp_path)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_queries_keys_values_split_and_join(groups: int) -> None:
    heads = HeadShape(groups=groups, queries=4 // groups, width=3)
    fused = torch.arange(groups * (4 // groups + 2) * 3 * 5.0).view(-1, 5)
    parts = split_qkv(fused, heads)
    assert [len(part) for part in parts] == [12, 3 * groups, 3 * groups]
    assert torch.equal(join_qkv(*parts, heads), fused)
    # Megatron's order within a group: its queries, its key, its value.
    assert torch.equal(parts[1][:3], fused[4 // groups * 3 :][:3])
