"""Per-GPU memory and traffic, against figures by hand and what real ranks keep and send."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cover import selected, slow_unless_in
from support.in_process import MINIMAL
from support.launches import REPOSITORY, launch_calls, run_command
from support.parallel_models import measure

from megatron_smlp import plugin_files
from megatron_smlp.accounting.costs import ModelShape, model_cost
from megatron_smlp.accounting.estimate import estimate, main, merged, resolve, uncounted
from megatron_smlp.accounting.footprint import footprint
from megatron_smlp.accounting.ranks import ParallelLayout, parameters_on_rank, stage_cost
from megatron_smlp.accounting.traffic import pipeline_traffic

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "seq_length": 32,
    "vocab_size": 1000,
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "transformer": {"architecture": "transformer"},
    "switch": {"architecture": "transformer", "num_experts": 8, "moe_layer_freq": 2},
    "hash": {"architecture": "transformer", "num_experts": 8, "token_router": "hash"},
    "gmlp": {"architecture": "gmlp"},
    "smlp": {
        "architecture": "smlp", "num_dense_layers": 2, "feature_router": "deterministic",
        "num_feature_experts": 4, "token_router": "base", "num_experts": 8,
    },
}  # fmt: skip


def _resolved(system: str, tp: int = 1, pp: int = 1, ep: int = 1, world: int = 1, **changes: Any):
    values = SIZES | SYSTEMS[system] | changes
    return resolve(
        values
        | {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "expert_model_parallel_size": ep,
            "expert_tensor_parallel_size": 1,
            "world_size": world,
            "padded_vocab_size": 1024,
        }
    )


def test_memory_by_hand():
    """Two data parallel ranks, bf16: 2 B weights, 4 B gradients, 12 B / 2 optimizer state."""
    changes = {"bf16": True, "use_distributed_optimizer": True}
    args = _resolved("gmlp", 1, 1, 1, 2, **changes)
    shape = ModelShape.from_args(args)
    result = footprint(shape, ParallelLayout.from_args(args))
    count = model_cost(shape).parameters
    assert (result.parameters, result.weight_bytes) == (count, 2 * count)
    assert (result.gradient_bytes, result.optimizer_bytes) == (4 * count, count // 2 * 12)
    per_layer = 2 * 64 + 2 * 256 + 3 * 128
    logits = 32 * 1024 * (2 + 4)
    assert result.activation_bytes == 4 * per_layer * 32 * 2 + logits
    alone = dataclasses.replace(ParallelLayout.from_args(args), data=1, precision="fp32")
    assert footprint(shape, alone).optimizer_bytes == 8 * count
    assert result.memory_bytes == 6 * count + count // 2 * 12 + result.activation_bytes


def test_memory_of_a_save_by_hand():
    """State, plus 8 B per parameter of one bucket and a copy of this rank's share of them."""
    changes = {"bf16": True, "use_distributed_optimizer": True}
    # In a single bucket; dense parameters and experts are saved one after the other.
    gpu = estimate(SIZES | changes | {"architecture": "gmlp", "world_size": 2})["per_gpu"]
    count = gpu["parameters"]
    state = 6 * count + count // 2 * 12
    assert gpu["save_gpu_bytes"] == state + 4 * (2 * count + count // 2)
    for less in ("distrib_optim_fully_reshardable_mem_efficient", "optimizer_checkpoint"):
        value = "data_parallel" if less == "optimizer_checkpoint" else True
        flags = SIZES | changes | {"architecture": "gmlp", "world_size": 2, less: value}
        assert estimate(flags)["per_gpu"]["save_gpu_bytes"] == state
    args = _resolved("hash", 1, 1, 2, 2, **changes)
    shape, layout = ModelShape.from_args(args), ParallelLayout.from_args(args)
    dense, experts = parameters_on_rank(stage_cost(shape, layout, 0), layout)
    assert experts > dense
    state = 6 * (dense + experts) + 12 * (dense // 2 + experts)
    assert footprint(shape, layout).save_gpu_bytes == state + 4 * 3 * experts
    # In buckets, which only the first stage has: 40 million, and a table of 32,000 x 4,096.
    large = {"num_layers": 4, "hidden_size": 4096, "ffn_hidden_size": 16384, "vocab_size": 32000}
    flags = SIZES | changes | large | {"architecture": "gmlp", "overlap_grad_reduce": True}
    gpu = estimate(flags | {"world_size": 4})["per_gpu"]
    bucket = 40_000_000 + 32000 * 4096
    assert gpu["parameters"] > bucket
    state = gpu["memory_bytes"] - gpu["activation_bytes"]
    assert gpu["save_gpu_bytes"] == state + 4 * (2 * bucket + bucket // 4)
    args = resolve(flags | {"world_size": 8, "pipeline_model_parallel_size": 2})
    shape, layout = ModelShape.from_args(args), ParallelLayout.from_args(args)
    count, _ = parameters_on_rank(stage_cost(shape, layout, 1), layout)
    state = 6 * count + count // 4 * 12
    assert footprint(shape, layout).save_gpu_bytes == state + 4 * (2 * count + count // 4)


@pytest.mark.parametrize(
    ("changes", "gradients", "copies", "sent"),
    [
        ({"fp16": True}, 2, 4, 4),
        ({"fp16": True, "use_distributed_optimizer": True}, 2, 4 / 2, 2 + 2),
        ({"fp16": True, "accumulate_allreduce_grads_in_fp32": True}, 4, 0, 8),
        ({"bf16": True, "grad_reduce_in_bf16": True}, 2, 4, 4),
        ({"bf16": True}, 4, 0, 8),
        ({"grad_reduce_in_bf16": True}, 4, 0, 8),
    ],
)
def test_gradients_by_hand(changes: dict[str, Any], gradients: int, copies: float, sent: int):
    """Two ranks. Adam steps in fp32: it copies other gradients, after activations are freed."""
    shape, parallel = _both("gmlp", 1, 1, 1, 2, **changes)
    result, count = footprint(shape, parallel), model_cost(shape).parameters
    assert result.gradient_bytes == gradients * count
    assert result.gradient_copy_bytes == copies * count
    assert result.data_parallel_bytes == round(sent / 2 * count)
    most = max(result.activation_bytes, copies * count)
    state = result.weight_bytes + result.optimizer_bytes
    assert result.memory_bytes == state + gradients * count + most
    long = dataclasses.replace(parallel, micro_batch_size=1000)
    activations = footprint(shape, long).activation_bytes
    assert footprint(shape, long).memory_bytes == state + gradients * count + activations


@pytest.mark.parametrize(
    "line", ["use-precision-aware-optimizer: true", "recompute-modules: [core_attn, layernorm]"]
)
def test_what_is_not_counted_is_refused(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flag = line.partition(":")[0]
    config = tmp_path / "model.yaml"
    config.write_text(f"num-layers: 4\nhidden-size: 64\nseq-length: 128\n{line}\n")
    assert main(["--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert f"--{flag} " in error
    assert f"--no-{flag} omits it" in error
    assert main(["--config", str(config), f"--no-{flag}"]) == 0
    assert uncounted({"optimizer": "adam", "fp8_format": None, "use_torch_fsdp2": False}) == []
    assert uncounted({"recompute_modules": "core_attn"}) == []  # as on a command line


def test_traffic_by_hand():
    """Ring collectives: an all-reduce of S bytes over n ranks sends 2 (n - 1) / n S."""
    hidden = 2 * 32 * 64 * 4  # a micro-batch of 2 in fp32
    options = {"micro_batch_size": 2, "global_batch_size": 12}
    one = footprint(*_both("transformer", 1, 1, 1, 1, **options))
    assert one.communication_bytes == 0
    pipeline = _both("transformer", 1, 4, 1, 4, **options)
    sent = [pipeline_traffic(*pipeline, stage) for stage in range(4)]
    tied = 1024 * 64 * 4  # once a step, between the first and the last stage
    assert sent == [6 * hidden + tied, 2 * 6 * hidden, 2 * 6 * hidden, 6 * hidden + tied]
    assert footprint(*pipeline).pipeline_parallel_bytes in sent
    data = footprint(*_both("transformer", 1, 1, 1, 3, **options))
    assert data.data_parallel_bytes == round(2 * 2 / 3 * 4 * data.parameters)


def test_traffic_of_the_distributed_optimizer_by_hand():
    """4-byte gradients are reduced and 2-byte weights gathered; experts have two replicas."""
    changes = {"bf16": True, "use_distributed_optimizer": True}
    shape, parallel = _both("switch", 1, 1, 2, 4, **changes)
    dense, experts = parameters_on_rank(stage_cost(shape, parallel, 0), parallel)
    sent = 3 / 4 * dense * (4 + 2) + 1 / 2 * experts * (4 + 2)
    assert footprint(shape, parallel).data_parallel_bytes == sent


def test_tensor_traffic_of_a_plugin_by_hand():
    """Two projections gather the tokens each, forward and backward, and scatter their gradients:
    8 D numbers of a token with the last projection's, and 5 D in the FFN."""
    plugin_files.load(str(REPOSITORY / "plugins" / "gated_conv.py"))
    layout = {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    values = SIZES | layout | {"architecture": "gated_conv", "global_batch_size": 1}
    sent = [
        estimate(values | {"num_layers": count})["per_gpu"]["tensor_parallel_bytes"]
        for count in (2, 3)
    ]
    assert sent[1] - sent[0] == (8 + 5) * 64 * 32 * 4 / 2


def _both(*arguments: Any, **changes: Any) -> tuple[ModelShape, ParallelLayout]:
    args = _resolved(*arguments, **changes)
    return ModelShape.from_args(args), ParallelLayout.from_args(args)


LENGTH, BATCH = 192, 4


DISPATCHER = "--moe-token-dispatcher-type alltoall"
EXPERTS = f"""
    --architecture transformer --num-experts 4 --moe-ffn-hidden-size 256 {DISPATCHER}
"""
SPARSE_MLP = f"""
    --architecture smlp --num-dense-layers 2 --num-feature-experts 4 --num-experts 4
    --moe-ffn-hidden-size 256 {DISPATCHER} --token-router base
"""
WHOLE_EXPERTS = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
FULL = "--recompute-granularity full"
ON_TWO_RANKS = {
    "transformer": "--architecture transformer",
    "rope": "--architecture transformer --sequence-parallel --position-embedding-type rope",
    "modern": "--architecture transformer --position-embedding-type rope --swiglu"
    " --disable-bias-linear --group-query-attention --num-query-groups 2",
    "quick_geglu": "--architecture transformer --quick-geglu",
    "qk": "--architecture transformer --qk-layernorm",
    "modern_experts": f"{EXPERTS} --token-router topk --swiglu --disable-bias-linear"
    f" {WHOLE_EXPERTS}",
    "mixer_sequence": "--architecture mixer --sequence-parallel",
    "gmlp": "--architecture gmlp",
    "gmlp_bf16": "--architecture gmlp --bf16",
    "gmlp_heads": "--architecture gmlp --spatial-heads 4",
    "amlp": "--architecture amlp --tiny-attention-width 16 --sequence-parallel",
    "mixer_expansion": "--architecture mixer --spatial-heads 4 --mixer-expansion",
    "switch": f"{EXPERTS} --token-router switch {WHOLE_EXPERTS}",
    "switch_split_bf16": f"{EXPERTS} --token-router switch --bf16",
    "hash": f"{EXPERTS} --token-router hash {WHOLE_EXPERTS}",
    # The estimate counts GShard's second expert as if it were always used.
    "gshard": f"{EXPERTS} --token-router gshard --gshard-second-expert all {WHOLE_EXPERTS}",
    "shared": f"{EXPERTS} --token-router topk {WHOLE_EXPERTS}"
    " --moe-shared-expert-intermediate-size 64",
    "smlp": f"{SPARSE_MLP} --feature-router deterministic {WHOLE_EXPERTS}",
    "partial": f"{SPARSE_MLP} --feature-router partial {WHOLE_EXPERTS}",
    "transformer_full": f"{FULL} --recompute-method uniform --recompute-num-layers 1",
    "transformer_by_two": f"{FULL} --recompute-method uniform --recompute-num-layers 2",
    "transformer_block": f"{FULL} --recompute-method block --recompute-num-layers 2",
    "transformer_selective": "--recompute-granularity selective",
    "gmlp_selective": "--architecture gmlp --recompute-activations",
    "amlp_selective": "--architecture amlp --spatial-heads 4 --tiny-attention-width 16"
    " --recompute-activations --position-embedding-type rope",
    "partial_selective": f"{SPARSE_MLP} --feature-router partial {WHOLE_EXPERTS}"
    " --recompute-granularity selective",
}
# Each kind of layer, with sequence parallelism and with recomputation.
FAST = ("modern_experts", "gmlp_bf16", "amlp", "smlp", "partial_selective")
TWO_RANKS = """
    --hidden-size 64 --ffn-hidden-size 256 --num-attention-heads 4 --seq-length 128 --num-layers 4
    --vocab-size 100 --micro-batch-size 2 --global-batch-size 2 --tensor-model-parallel-size 2
"""


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    """Return each case's mean over two tensor parallel ranks: experts may get unequal loads."""
    folder = tmp_path_factory.mktemp("ranks")
    asked = sorted(name for (name,) in selected(request, "on_ranks"))
    cases = {name: f"{TWO_RANKS} {ON_TWO_RANKS[name]}" for name in asked}
    launch_calls(measure, cases, str(folder), processes=2, log=folder / "log")
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return {
        name: {kind: (ranks[0][name][kind] + ranks[1][name][kind]) / 2 for kind in ranks[0][name]}
        for name in cases
    }


@pytest.mark.parametrize("on_ranks", slow_unless_in(FAST, ON_TWO_RANKS))
def test_what_a_tensor_parallel_rank_keeps_and_sends(
    on_ranks: str, measured: dict[str, dict[str, float]]
):
    """Ranks' experts may get unequal numbers of tokens; scores and sums are not counted."""
    counted, ours = footprint(*_on_two_ranks(on_ranks)), measured[on_ranks]
    assert counted.activation_bytes == pytest.approx(ours["kept"], rel=0.1)
    assert counted.tensor_parallel_bytes == pytest.approx(ours["tensor"], rel=0.05)
    assert counted.expert_parallel_bytes == pytest.approx(ours["expert"], rel=0.1)


def _on_two_ranks(case: str) -> tuple[ModelShape, ParallelLayout]:
    flags = f"{TWO_RANKS} {ON_TWO_RANKS[case]}".replace(DISPATCHER, "").split()
    values = merged({}, flags)
    # Only a GPU fuses SwiGLU.
    values |= {"padded_vocab_size": 104, "world_size": 2, "no_bias_swiglu_fusion": True}
    args = resolve(values)
    return ModelShape.from_args(args), ParallelLayout.from_args(args)


@pytest.mark.parametrize("architecture", ["mixer", "transformer"])
def test_a_width_that_is_left_out_is_the_trainings(parse: Any, architecture: str):
    flags = f"--architecture {architecture} --hidden-size 96 --swiglu --num-attention-heads 4"
    trained = parse(flags, base=MINIMAL.replace("--ffn-hidden-size 64", ""))
    sizes = {name: value for name, value in SIZES.items() if name != "ffn_hidden_size"}
    counted = resolve({**sizes, "architecture": architecture, "hidden_size": 96, "swiglu": True})
    assert counted.ffn_hidden_size == trained.ffn_hidden_size


@pytest.mark.parametrize("word", ["[0,1]*2", "([0,1])*2", "[0,1]+[0,1]", "[0,1,0,1]", "2"])
def test_which_layers_have_experts_is_given_as_to_a_training(word: str):
    given = merged(SIZES | SYSTEMS["switch"], ["--moe-layer-freq", word])
    found = resolve(given).moe_layer_freq
    assert found == (2 if word == "2" else [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 3, "tensor_model_parallel_size": 2}, "--world-size 3 is not a multiple"),
        ({"pipeline_model_parallel_size": 3}, "--num-layers 4 is not a multiple of PP = 3"),
        ({"num_experts": 3, "expert_model_parallel_size": 2}, "--num-experts 3 is not a multiple"),
        ({"global_batch_size": 5, "micro_batch_size": 2}, "--global-batch-size 5"),
        ({"hidden_sizes": 5}, "did you mean hidden_size?"),
        ({"clip_gard": 0.5}, "did you mean clip_grad?"),  # not a size, but a study may set it
        ({"num_layers": None}, "--num-layers missing"),
        ({"moe_layer_freq": "[0,x]*2"}, r"--moe-layer-freq \[0,x\]\*2: give a number or list"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        estimate(SIZES | changes)


def test_estimate_prints_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "model.yaml"
    lines = (SIZES | SYSTEMS["smlp"] | {"lr": 1e-3}).items()
    config.write_text("\n".join(f"{key.replace('_', '-')}: {value}" for key, value in lines))
    assert main(["--config", str(config), "--json", "--expert-model-parallel-size", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    cost = model_cost(ModelShape.from_args(resolve(SIZES | SYSTEMS["smlp"])))
    assert result["total_parameters"] == cost.parameters
    assert result["active_parameters"] == cost.active_parameters
    assert result["per_gpu"]["expert_parallel_bytes"] > 0
    assert main(["--config", str(config)]) == 0
    assert f"{cost.parameters:,}" in capsys.readouterr().out
    for argv, share in (([], 12), (["--optimizer-checkpoint", "data_parallel"], 0)):
        assert main(["--config", str(config), "--use-distributed-optimizer", *argv, "--json"]) == 0
        gpu = json.loads(capsys.readouterr().out)["per_gpu"]
        assert gpu["save_host_bytes"] == share * gpu["parameters"]
    assert main(["--config", str(config), "--async-save", "--json"]) == 0
    gpu = json.loads(capsys.readouterr().out)["per_gpu"]
    assert gpu["save_pinned_bytes"] == 2 * (gpu["weight_bytes"] + gpu["optimizer_bytes"])
    assert main(["--config", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml: no such file" in capsys.readouterr().err


def printed(flags: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*flags.split(), "--json"]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_flags_of_the_model_stand_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """They override the file's keys, --no-KEY drops one of those, and no file is needed."""
    config = tmp_path / "model.yaml"
    config.write_text("num-layers: 4\nhidden-size: 64\nseq-length: 128\nnum-experts: 8\nlr: 1\n")
    file = f"--config {config}"
    flags = "--num-layers 4 --hidden-size=64 --seq-length 128"
    assert printed(f"{file} --no-num-experts", capsys) == printed(flags, capsys)
    given = "--num-experts 8 --no-num-experts"
    assert printed(f"{file} {given}", capsys) == printed(flags, capsys)
    assert printed(f"{file} --moe-layer-freq [0,1,0,1] --swiglu", capsys) == printed(
        f"{flags} --num-experts 8 --moe-layer-freq 0 1 0 1 --swiglu", capsys
    )
    assert printed(f"{file} --bf16", capsys) != printed(file, capsys)
    others = "--data-path 0.5 a 0.5 b --lr 1e-3 --save runs/first --no-load-optim"
    assert printed(f"{flags} {others}", capsys) == printed(flags, capsys)


def test_a_tokenizer_says_how_large_the_vocabulary_is(capsys: pytest.CaptureFixture[str]):
    flags = "--num-layers 4 --hidden-size 64 --seq-length 128"
    null = "--tokenizer-type NullTokenizer --vocab-size 999"
    assert printed(f"{flags} {null}", capsys) == printed(f"{flags} --vocab-size 1000", capsys)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--num-layer 4", "did you mean"),
        ("--no-swiglu", "--no-swiglu"),
        ("--hidden-size", "--hidden-size"),
        ("--hidden-size [4", "--hidden-size"),
        ("--num-layers 2.5", "--num-layers 2.5"),
        ("--rotary-percent half", "--rotary-percent half"),
        ("--num-attention-heads 5", "--num-attention-heads 5"),
        ("--architecture smlp --num-dense-layers 9", "--num-dense-layers 9"),
        ("--num-experts 4 --moe-layer-freq [0,1]", "--moe-layer-freq [0, 1]"),
        ("--feature-router partial --num-feature-experts 2 --prefix-fraction 2 --architecture smlp",
         "--prefix-fraction 2"),
        ("--architecture smpl", "--architecture smpl"),
        ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model nowhere/at/all", "nowhere"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_line(flags: str, named: str, capsys: pytest.CaptureFixture[str]):
    sizes = ["--num-layers", "4", "--hidden-size", "64", "--seq-length", "128"]
    assert main([*sizes, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_the_tool_runs_without_torch():
    tool = Path(__file__).parents[2] / "tools" / "estimate.py"
    sizes = ["--num-layers", "2", "--hidden-size", "64", "--seq-length", "128"]
    code = (
        f"import sys; sys.argv = ['estimate.py', *{sizes!r}]; import runpy\n"
        f"try: runpy.run_path({str(tool)!r}, run_name='__main__')\n"
        f"except SystemExit: pass\n"
        f"sys.exit(bool({{'torch', 'megatron'}} & set(sys.modules)))"
    )
    run_command([sys.executable, "-c", code])
