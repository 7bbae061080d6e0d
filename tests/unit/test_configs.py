"""Files of configs/: FLOPs budgets, GPU memory, shards of large models on 96 ranks, includes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden.behaviour import CONFIGS as FILES
from golden.behaviour import configs
from support.cover import slow_unless_in
from support.in_process import pretrained
from support.launches import steps
from support.meta_models import built_parameters, expected_parameters

from megatron_smlp.accounting.estimate import estimate
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.yaml_file import read_settings, read_yaml, spelling

TOKEN_MOES = ("gshard", "switch", "base", "hash")
# The regular Transformer, 24 layers of the known width, has 0.827; the paper says "about 0.8".
FOLDERS = {"cpu": 0.0134, "paper/regular": 0.827, "paper/large": 2.0}
VOCABULARY = {"cpu": 4096, "paper/regular": 50257, "paper/large": 50257}
# tests/golden/namespaces.json lists the files that there have to be.
CONFIGS = [(str(path.parent.relative_to(FILES)), path.stem) for path in configs()]
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size"


def config(folder: str, system: str) -> Path:
    return FILES / folder / f"{system}.yaml"


def estimated(folder: str, system: str) -> dict[str, Any]:
    values = {spelling(key): value for key, value in read_yaml(config(folder, system)).items()}
    return estimate(values | {"vocab_size": VOCABULARY[folder]})


@pytest.mark.parametrize(("folder", "system"), CONFIGS)
def test_flops_are_the_folders_budget(folder: str, system: str):
    tflops = estimated(folder, system)["forward_tflops_per_1024_tokens"]
    assert abs(tflops / FOLDERS[folder] - 1) < 0.03


def test_the_large_moes_have_the_papers_sizes():
    for system in TOKEN_MOES:
        assert 9e9 < estimated("paper/large", system)["total_parameters"] < 10e9
    for system in ("smlp_deterministic", "smlp_partial"):
        parameters = estimated("paper/large", system)["total_parameters"]
        assert abs(parameters / 9.41e9 - 1) < 0.01


def named_layout(file: Path) -> dict[str, int]:
    """Return the layout in the comment `On N GPUs: --flag size ...`, which may span lines."""
    text = file.read_text(encoding="utf-8")
    found = re.search(r"^# On (\d+) GPUs: (.*(?:\n# --.*)*)", text, re.MULTILINE)
    assert found, file
    sizes = re.findall(r"--([a-z-]+) (\d+)", found[2])
    assert 2 * len(sizes) == len(found[2].replace("#", "").split()), found[2]
    return {"world_size": int(found[1])} | {spelling(name): int(size) for name, size in sizes}


@pytest.mark.parametrize(("folder", "system"), [case for case in CONFIGS if case[0] != "cpu"])
def test_a_gpu_holds_it_and_recomputes_only_what_it_must(folder: str, system: str):
    """A model fits into 80 GB in its file's layout, with a tenth left for temporary tensors."""
    values = {spelling(key): value for key, value in read_yaml(config(folder, system)).items()}
    values["vocab_size"] = VOCABULARY[folder]
    if folder == "paper/large" or "num_experts" in values:
        values |= named_layout(config(folder, system))
    assert values.setdefault("world_size", 8) == (128 if folder == "paper/large" else 8)
    gib = estimate(values)["per_gpu"]["memory_bytes"] / 2**30
    assert gib < 0.9 * 80 * 1e9 / 2**30
    if system != "llama_moe":
        assert gib < (20 if folder == "paper/large" else 24)  # as docs/gpus.md says
    assert "recompute_granularity" not in values


STAGES = {"gmlp": 2, "amlp": 1, "smlp": 3, "transformer": 4}
"""Pipeline stages into which an architecture's layers can be cut."""
RANKS = 96


ENDS = "the first and last of each stage"


@pytest.mark.parametrize(
    ("system", "of"),
    slow_unless_in(
        [("base", ENDS), ("amlp", ENDS), ("smlp_partial", ENDS)],
        [
            *((system, ENDS) for folder, system in CONFIGS if folder == "paper/large"),
            ("smlp_deterministic", "all"),
        ],
    ),
)
def test_shards_of_the_large_models(
    parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, system: str, of: str
):
    """Megatron builds the shard of each rank, without storage; each has the expected size."""
    values = read_yaml(config("paper/large", system))
    has_experts = "num-experts" in values
    stages = STAGES[values["architecture"]]
    layout = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": stages,
        "expert_model_parallel_size": 4 if has_experts else 1,
        "global_batch_size": 768,
    }
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in layout.items())
    argv = f"--config {config('paper/large', system)} {DATA} 50257 {flags}"
    expert_tensor = ("", " --expert-tensor-parallel-size 1") if has_experts else ("",)
    of_stage = RANKS // stages
    ends = {rank for first in range(0, RANKS, of_stage) for rank in (first, first + of_stage - 1)}
    ranks = range(RANKS) if of == "all" else sorted(ends)
    monkeypatch.setenv("WORLD_SIZE", str(RANKS))
    for more in expert_tensor:
        args = parse(argv + more, base="")
        for args.rank in ranks:
            expected = expected_parameters(args, stage=args.rank // of_stage)
            assert built_parameters(args, monkeypatch) == expected, (args.rank, more)


RECIPES = {
    "llama": "2026_attention",
    "llama_moe": "2026_attention",
    "gmlp": "2026",
    "smlp_deterministic": "2026",
}
SMALL = """--seq-length 32 --hidden-size 64 --ffn-hidden-size 128 --micro-batch-size 2
    --global-batch-size 2 --train-iters 2 --eval-iters 0 --log-interval 1"""


@pytest.mark.parametrize("system", slow_unless_in(("llama_moe", "smlp_deterministic"), RECIPES))
def test_a_recipe_over_a_system_trains(system: str, tmp_path: Path):
    files = f"--config {config('cpu', system)} --config {config('recipes', RECIPES[system])}"
    experts = (
        "--moe-ffn-hidden-size 64" if "num-experts" in read_yaml(config("cpu", system)) else ""
    )
    with pretrained(f"{files} {DATA} 300 {SMALL} {experts} --save {tmp_path}", base=""):
        pass
    assert len(steps(tmp_path)) == 2
    names = TorchDistCheckpoint(tmp_path).all_specs
    assert any("momentum_buffer" in name for name in names)
    assert any("q_layernorm" in name for name in names) == ("llama" in system)


class TestInclude:
    def test_own_keys_win_and_spelling_does_not_matter(self, tmp_path: Path):
        (tmp_path / "base.yaml").write_text("lr: 1\nnum-layers: 2\n")
        (tmp_path / "top.yaml").write_text("include: base.yaml\nnum_layers: 3\n")
        assert read_yaml(tmp_path / "top.yaml") == {"lr": 1, "num_layers": 3}

    def test_own_keys_stand_in_for_those_that_they_exclude(self, tmp_path: Path):
        (tmp_path / "base.yaml").write_text("train-iters: 300\nlr-warmup-iters: 3\nbf16: true\n")
        own = "train-samples: 4800\nlr-warmup-fraction: 0.5\nfp16: false\n"
        (tmp_path / "top.yaml").write_text(f"include: base.yaml\n{own}")
        keys = read_yaml(tmp_path / "top.yaml")
        assert keys.keys() == {"train-samples", "lr-warmup-fraction", "bf16", "fp16"}
        (tmp_path / "base.yaml").write_text("lr-warmup-fraction: 0.5\n")
        (tmp_path / "top.yaml").write_text("include: base.yaml\nlr-warmup-iters: 0\n")
        assert read_yaml(tmp_path / "top.yaml") == {"lr-warmup-iters": 0}

    def test_several_compose_a_run_and_a_later_one_wins(self, tmp_path: Path):
        """Model, data and optimizer in files of their own, some in a folder of their own."""
        (tmp_path / "parts").mkdir()
        (tmp_path / "base.yaml").write_text("lr: 1\nseed: 5\n")
        (tmp_path / "parts" / "model.yaml").write_text("include: ../base.yaml\nnum-layers: 2\n")
        (tmp_path / "parts" / "adam.yaml").write_text("include: ../base.yaml\nlr: 2\n")
        top = tmp_path / "top.yaml"
        top.write_text("include: [parts/model.yaml, parts/adam.yaml]\nseed: 6\n")
        assert read_yaml(top) == {"num-layers": 2, "lr": 2, "seed": 6}
        top.write_text("include: [parts/adam.yaml, parts/model.yaml]\n")
        assert read_yaml(top) == {"num-layers": 2, "lr": 1, "seed": 5}
        assert read_yaml(top, tmp_path / "parts" / "adam.yaml")["lr"] == 2
        places = {key: setting.place for key, setting in read_settings([top]).items()}
        assert places["lr"] == f"{tmp_path}/base.yaml:1"
        assert places["num-layers"] == f"{tmp_path}/parts/model.yaml:2"

    def test_a_circle_and_a_missing_file_are_named(self, tmp_path: Path):
        path = tmp_path / "top.yaml"
        path.write_text("include: top.yaml\n")
        with pytest.raises(UsageError, match="includes itself"):
            read_yaml(path)
        (tmp_path / "other.yaml").write_text("include: top.yaml\n")
        path.write_text("include: [other.yaml]\n")
        circle = rf"{path} includes {tmp_path}/other\.yaml includes {path}\. Remove"
        with pytest.raises(UsageError, match=circle):
            read_yaml(path)
        (tmp_path / "other.yaml").unlink()
        path.write_text("include: other.yaml\n")
        with pytest.raises(UsageError, match=r"other\.yaml: no such file"):
            read_yaml(path)
        path.write_text("include: [a.yaml, 1]\n")
        with pytest.raises(UsageError, match="'include' takes a file, or a list"):
            read_yaml(path)
