"""A flag that would do nothing here is refused; one that works is not."""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.in_process import MINIMAL, forget_arguments, prepare_megatron, pretrained
from support.launches import REPOSITORY

from megatron_smlp.accounting.costs import ModelShape
from megatron_smlp.checkpoints.folders import TRACKER, iteration_folder
from megatron_smlp.checkpoints.model_record import model_flags
from megatron_smlp.checkpoints.run_record import write_records
from megatron_smlp.data.blending import SPLIT_FLAGS, WHOLE_FLAGS
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.parse import build_parser, parse_arguments
from megatron_smlp.flags.unused_flags import (
    ATTENTION_FLAGS,
    OTHER_LAYER_FLAGS,
    OTHER_LAYERS,
    OTHER_PROGRAMS,
    READ_HERE,
    READ_NOWHERE,
    REFUSED,
    TRANSFORMER_ENGINE_FLAGS,
    refuse_unused,
)
from megatron_smlp.model import model_config
from megatron_smlp.options import OUR_FLAGS
from megatron_smlp.platform import cpu
from megatron_smlp.training.console import data_text
from megatron_smlp.training.start_screen import summary

TRANSFORMER = "--architecture transformer --num-attention-heads 4"
type Parse = Callable[[str], Any]


@pytest.fixture
def parse() -> Iterator[Parse]:
    prepare_megatron()

    def parsed(words: str) -> Any:
        return parse_arguments([*MINIMAL.split(), *words.split()])

    yield parsed
    forget_arguments()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{TRANSFORMER} --multi-latent-attention", "--multi-latent-attention builds layers of "),
        ("--architecture gmlp --mtp-num-layers 1", "--mtp-num-layers builds layers of other "),
        ("--architecture gmlp --qk-layernorm", "--qk-layernorm is for the attention of "),
        ("--architecture amlp --group-query-attention --num-query-groups 2", "not for amlp"),
        ("--architecture smlp --window-size 4,0", "--window-size is for the attention of "),
        ("--architecture gmlp --reset-attention-mask", "--reset-attention-mask looks at docum"),
        (
            f"{TRANSFORMER} --disable-bias-linear --add-qkv-bias",
            "--add-qkv-bias without other bias",
        ),
        (
            f"{TRANSFORMER} --reset-position-ids",
            "--reset-position-ids looks at documents, and samples",
        ),
        (
            "--architecture gmlp --position-embedding-type rope",
            "--position-embedding-type rope acts on .* give none or learned_absolute, or leave",
        ),
        ("--architecture gmlp --use-te-activation-func", "--use-te-activation-func puts the tanh"),
        (
            "--architecture gmlp --dataloader-inter-document-masking",
            "--dataloader-inter-document-masking looks at documents",
        ),
        (
            f"{TRANSFORMER} --overlap-moe-expert-parallel-comm",
            "--overlap-moe-expert-parallel-comm runs layers in parts by a plan",
        ),
        (f"{TRANSFORMER} --delay-wgrad-compute", "--delay-wgrad-compute is for --overlap-moe"),
        (f"{TRANSFORMER} --optimizer-cuda-graph", "--optimizer-cuda-graph would replay updates"),
        (
            f"{TRANSFORMER} --non-persistent-save-interval 5 --non-persistent-ckpt-type global",
            "--non-persistent-save-interval makes checkpoints of another kind, .* give --save-",
        ),
        (
            "--architecture aft --recompute-granularity selective",
            r"--recompute-modules core_attn \(the default\): no layer of this --architecture aft",
        ),
        (
            "--architecture amlp --token-router hash --num-experts 2 --mlp-chunks-for-training 2",
            "--mlp-chunks-for-training is not available with --token-router hash: it routes all",
        ),
        (
            "--architecture smlp --num-dense-layers 1 --num-feature-experts 2 --feature-router "
            "partial --calculate-per-token-loss",
            "--calculate-per-token-loss with --partial-loss suffix would divide",
        ),
    ],
)
def test_other_layers_flags(parse: Parse, words: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rampup-batch-size 2 2 8", "not read by this program: give --step-batch-size-schedule"),
        ("--per-dataset-sequences-path x", "--per-dataset-sequences-path is not read"),
        ("--dataloader-fast-cache-load", "--dataloader-fast-cache-load is not read"),
        ("--use-flash-attn", "give --attention-backend"),
        ("--yaml-cfg x.yaml", "give --config"),
        ("--inprocess-restart", "--inprocess-restart wraps the entry .*: leave it out"),
        ("--enable-ft-package", "--enable-ft-package reads the command line once more"),
        ("--check-for-spiky-loss", "--nonfinite-loss looks at every loss"),
        (
            "--spec megatron.core foo",
            "--spec megatron.core foo builds layers that are ",
        ),
        ("--grpo-iterations 3", r"for another program of Megatron's \(rl\)"),
        ("--num-classes 7", r"for another program of Megatron's \(vision\)"),
        ("--ict-head-size 7", r"for another program of Megatron's \(biencoder\)"),
        ("--inference-max-requests 7", r"for another program of Megatron's \(inference\)"),
        ("--sft", r"for another program of Megatron's \(sft\)"),
        (
            "--token-router switch --num-experts 2 --moe-grouped-gemm",
            "--moe-grouped-gemm needs Transformer Engine",
        ),
        ("--data-path x", "--mock-data beside --data-path"),
        ("--valid-data-path x", "--mock-data beside --valid-data-path"),
        ("--tokenizer-type HuggingFaceTokenizer", "--vocab-size 100 beside --tokenizer-type Hugg"),
        ("--tokenizer-type GPT2BPETokenizer", "without --vocab-file and --merge-file"),
        ("--tokenizer-model /none", "--tokenizer-model /none: there is no such file or folder"),
        ("--tokenizer-model tests/none", "there is no such file or folder"),
        ("--tokenizer-model a/b/c", "there is no such file or folder"),
        ("--profile", "--profile marks a run for NVIDIA's profiler, and there is no GPU"),
        ("--optimizer muon", "--optimizer muon is not available: its state cannot be saved"),
        (
            "--recompute-granularity selective --recompute-modules core_attn layernorm",
            "--recompute-modules layernorm: Megatron recomputes this by Transformer Engine",
        ),
        ("--wandb-project p --wandb-exp-name n --save x", "--wandb-project p without a login"),
        ("--freeze-all-layers", "--freeze-all-layers freezes nothing"),
        (
            "--async-save --save x --use-persistent-ckpt-worker",
            "one is forked for each save. Leave",
        ),
        ("--attention-output-gate", "--attention-output-gate adds parameters that nothing here"),
        ("--checkpoint-activations", "is gone from Megatron: give --recompute-granularity full"),
        ("--exit-signal SIGUSR1", "--exit-signal would take the place of the signals that end"),
        ("--pretrained-checkpoint x", "is loaded without a look .*: give --load DIR --finetune"),
        ("--init-method-xavier-uniform", "--init-method-xavier-uniform stops Megatron 0.19"),
        ("--log-throughput", "--log-throughput counts a Transformer's FLOPs, whatever the model"),
        ("--ckpt-convert-format torch", "tools/convert_checkpoint.py converts"),
        ("--disable-jit-fuser", "--disable-jit-fuser changes nothing here"),
        ("--sample-rate 0.5", "--sample-rate is not read by this program: leave it out"),
        ("--rotary-base 5000", "--rotary-base is for the attention of --architecture transformer"),
        ("--attention-backend flash", "--attention-backend is for the attention of"),
        ("--mscale 2", "--mscale is for other positions than "),
        (
            "--recompute-activations --recompute-modules mlp",
            "mlp: no layer of this --architecture gmlp",
        ),
        (
            "--recompute-granularity selective --recompute-modules moe",
            "--recompute-modules moe: no layer of this --architecture gmlp has that",
        ),
        ("--cuda-graph-scope full_iteration", "--cuda-graph-scope full_iteration needs a CUDA"),
        ("--cuda-graph-modules full_iteration", "needs a CUDA device and none was found"),
        (
            "--spec megatron_smlp.architectures amlp",
            "--spec megatron_smlp.architectures amlp contradicts --architecture gmlp",
        ),
        ("--step-batch-size-schedule 0:2", "0:2 with --train-iters: Megatron counts samples"),
        ("--save-params-interval 2", "is read by Megatron's own training loop alone"),
        ("--use-megatron-fsdp", "is read by Megatron's own training loop alone"),
        ("--rerun-mode report_stats", "--rerun-mode report_stats repeats steps"),
        ("--rerun-mode validate_results", "--rerun-mode validate_results repeats steps"),
        ("--dataloader-type external", "--dataloader-type external needs a data loader of another"),
        ("--no-pad-vocab-size", "give --make-vocab-size-divisible-by 1"),
        ("--padded-vocab-size 90", "--padded-vocab-size 90 is less than the 100 ids"),
        ("--init-model-with-meta-device", "would start from uninitialised weights"),
        ("--optimizer lion", "Give --optimizer adam or sgd"),
        ("--log-device-memory-used", "--log-device-memory-used needs a CUDA device"),
        ("--ckpt-format torch", "--ckpt-format torch is not saved or loaded here"),
        (
            "--token-router hash --num-experts 2 --moe-z-loss-coeff 0.1",
            "--moe-z-loss-coeff 0.1 has no scores to keep small",
        ),
        (
            "--token-router base --num-experts 2 --moe-token-drop-policy probs",
            "--moe-token-drop-policy probs is for --token-router switch or gshard, and base drops",
        ),
        (
            "--token-router switch --num-experts 2 --moe-router-pre-softmax",
            "--moe-router-pre-softmax is for Megatron's own routing",
        ),
    ],
)
def test_flags_of_nothing_here(parse: Parse, words: str, message: str, monkeypatch):
    """One line, where a run would have ignored it or ended in a traceback."""
    monkeypatch.setenv("NETRC", "/none")
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=message):
        parse(f"--architecture gmlp {words}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{TRANSFORMER} --rotary-base 500000", "500000 does nothing without --position-embedding"),
        (f"{TRANSFORMER} --use-rope-scaling", "--use-rope-scaling does nothing without --position"),
        (
            f"{TRANSFORMER} --position-embedding-type rope --rope-scaling-factor 32",
            "--rope-scaling-factor 32.0 does nothing without --use-rope-scaling: give both",
        ),
        (f"{TRANSFORMER} --num-query-groups 2", "does nothing without --group-query-attention"),
        (f"{TRANSFORMER} --kv-lora-rank 8", "--kv-lora-rank builds layers of other models"),
        (f"{TRANSFORMER} --mamba-state-dim 8", "--mamba-state-dim builds layers of other models"),
        (f"{TRANSFORMER} --softmax-type learnable", "--softmax-type learnable adds parameters"),
        (
            f"{TRANSFORMER} --token-router base --num-experts 2 --moe-mlp-glu-interleave-size 8",
            "--moe-mlp-glu-interleave-size 8 does nothing without --moe-grouped-gemm",
        ),
        (
            "--architecture smlp --num-feature-experts 8",
            "--num-feature-experts 8 does nothing without --feature-router: give both, or leave",
        ),
        (
            "--architecture smlp --token-router base --num-experts 2 --moe-layer-freq 2",
            "--moe-layer-freq 2 does nothing with --architecture smlp, .* --num-dense-layers says",
        ),
    ],
)
def test_flags_that_nothing_reads(parse: Parse, words: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse(words)


def test_a_checkpoint_may_have_recorded_them(parse: Parse, tmp_path: Path):
    words = "--architecture smlp --token-router base --num-experts 2"
    flags = model_flags(parse(words)) | {"moe_layer_freq": 2, "num_feature_experts": 8}
    forget_arguments()
    iteration_folder(tmp_path, 3).mkdir()
    write_records(iteration_folder(tmp_path, 3), flags, {})
    (tmp_path / TRACKER).write_text("3")
    more = "--moe-layer-freq 2 --num-feature-experts 8 --kv-lora-rank 64"
    assert parse(f"{words} {more} --load {tmp_path}").moe_layer_freq == 2


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed")
@pytest.mark.parametrize(
    "flag",
    [
        *("--apply-layernorm-1p", "--qk-layernorm", "--window-size 4,0"),
        *("--fp32-residual-connection --bf16", "--cpu-offloading-num-layers 1"),
        *(
            "--use-transformer-engine-op-fuser",
            "--moe-grouped-gemm --token-router base --num-experts 2",
        ),
    ],
)
def test_transformer_engines_flags(parse: Parse, flag: str):
    with pytest.raises(UsageError, match=re.escape(flag.split()[0]) + " needs Transformer Engine"):
        parse(f"{TRANSFORMER} {flag}")


EXPERT_FLAGS = [
    action
    for action in build_parser()._actions
    if action.dest.startswith("moe_") and action.dest not in OUR_FLAGS
]


@pytest.mark.parametrize("architecture", [TRANSFORMER, "--architecture gmlp"])
@pytest.mark.parametrize("action", EXPERT_FLAGS, ids=lambda action: action.dest)
def test_flags_of_experts_that_are_not_there(parse: Parse, action: Any, architecture: str):
    """They would train a dense model in silence."""
    flag = action.option_strings[0]
    value = "" if action.nargs == 0 else next(iter(action.choices or ["1"]))
    with pytest.raises(UsageError, match=f"^{flag}.* is for token experts, and .* without --token"):
        parse(f"{architecture} {flag} {value}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gmlp --swiglu", "--swiglu is for FFNs, and no layer of this --architecture gmlp has one"),
        (
            "transformer --num-attention-heads 4 --token-router base --num-experts 2 "
            "--moe-layer-freq [0,0,0,0]",
            r"--num-experts 2, but --moe-layer-freq \[0, 0, 0, 0\] leaves no layer",
        ),
        (
            "smlp --num-dense-layers 4 --token-router base --num-experts 2",
            "--num-experts 2, but --num-dense-layers 4 leaves no layer that has them",
        ),
    ],
)
def test_flags_of_what_no_layer_has(parse: Parse, words: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse(f"--architecture {words}")


@pytest.mark.parametrize(
    "words",
    [
        "amlp --attention-dropout 0.1",
        "gmlp --swiglu --token-router base --num-experts 2",
        "gmlp --squared-relu",
    ],
)
def test_flags_of_what_a_layer_has(parse: Parse, words: str):
    parse(f"--architecture {words}")


def test_every_name_is_one_of_megatrons_flags():
    destinations = {action.dest for action in build_parser()._actions}
    assert {*OTHER_LAYER_FLAGS, *ATTENTION_FLAGS} <= destinations
    assert {*TRANSFORMER_ENGINE_FLAGS, *REFUSED, *READ_HERE} <= destinations
    assert all(any(name.startswith(one) for name in destinations) for one in OTHER_LAYERS)
    assert {*OTHER_PROGRAMS} <= {group.title for group in build_parser()._action_groups}


def test_flags_of_a_page_are_flags():
    page = (REPOSITORY / "docs" / "from-megatron-lm.md").read_text(encoding="utf-8")
    page = page[page.index("## Other defaults") : page.index("## Existing checkpoints")]
    named = re.findall(r"(?<![\w-])--([a-z_-]*[a-z])(-\*|-\.\.\.|)", page)
    flags = {one for action in build_parser()._actions for one in action.option_strings}
    gone = [
        name
        for name, more in named
        if not (f"--{name}" in flags or (more and any(f.startswith(f"--{name}-") for f in flags)))
    ]
    assert len(named) > 40
    assert gone == []


def test_what_is_said_to_be_read_nowhere_is_not_read():
    """Neither as an attribute of arguments or configurations in Megatron, nor here."""
    import megatron.core
    import megatron.training

    megatrons = [Path(package.__path__[0]) for package in (megatron.core, megatron.training)]
    folders = [*megatrons, REPOSITORY / "megatron_smlp"]
    elsewhere = {
        "argument_utils.py",
        "arguments.py",
        "parse.py",
        "yaml_arguments.py",
        "unused_flags.py",
    }
    text = "".join(
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in folder.rglob("*.py")
        if path.name not in elsewhere and "config" not in path.parts
    )
    in_other_configurations = {
        # Of a configuration of datasets, which training/data.py makes without them.
        "object_storage_cache_path",
        "allow_ambiguous_pad_tokens",
    }
    names = "|".join(READ_NOWHERE)
    read = {found[1] for found in re.finditer(rf"\b(?:args|config)\.({names})\b", text)}
    assert read - in_other_configurations == set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("smlp", "note        no layer has experts: this model is that of --architecture gmlp"),
        (
            "smlp --token-router base --num-experts 4",
            "note        no spatial experts (--feature-router none): this is a gmlp with token exp",
        ),
        (
            "smlp --feature-router deterministic --num-feature-experts 4",
            "note        no token experts (--token-router none): spatial ones alone",
        ),
        (
            "smlp --feature-router deterministic --num-feature-experts 4 --token-router base "
            "--num-experts 4",
            "",
        ),
        ("gmlp", ""),
    ],
)
def test_an_smlp_that_is_less_is_said(parse: Parse, words: str, said: str):
    args = parse(f"--architecture {words}")
    notes = [line for line in summary(args, ModelShape.from_args(args)) if line[:4] == "note"]
    assert len(notes) == bool(said)
    assert "".join(notes).startswith(said)


def test_data_is_shown_by_its_split():
    nothing = dict.fromkeys((*WHOLE_FLAGS, *SPLIT_FLAGS))
    assert data_text(Namespace(**nothing, per_split_data_args_path="f.json")) == "f.json"
    assert data_text(Namespace(**nothing | {"data_path": [1, "a"]})) == "1 a"
    given = nothing | {"train_data_path": ["0.5", "a", "0.5", "b"], "valid_data_path": ["c"]}
    assert data_text(Namespace(**given)) == "train 0.5 a 0.5 b | valid c"


def test_batches_by_a_schedule_are_shown_as_such():
    words = MINIMAL.replace("--global-batch-size 2", "--step-batch-size-schedule 0:2")
    words = words.replace("--train-iters 4", "--train-samples 8")
    args = parse_arguments([*words.split(), "--architecture", "gmlp"])
    lines = list(summary(args, ModelShape.from_args(args)))
    forget_arguments()
    assert (
        "steps       8 samples in batches by --step-batch-size-schedule '0:2', samples of"
        in lines[-1]
    )


@pytest.mark.parametrize(
    "words",
    [
        f"{TRANSFORMER} --softmax-type vanilla",
        f"{TRANSFORMER} --group-query-attention --num-query-groups 2",
        f"{TRANSFORMER} --rotary-base 10000 --num-query-groups 1",
        f"{TRANSFORMER} --use-rotary-position-embeddings --rotary-base 500000",
        "--architecture smlp --num-feature-experts 8 --feature-router none",
        "--architecture gmlp --position-embedding-type learned_absolute",
        "--architecture gmlp --profile --use-pytorch-profiler --log-dir x",
    ],
)
def test_what_works_is_allowed(
    parse: Parse, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # Megatron opens the folder of TensorBoard when it has parsed
    assert parse(words)


@pytest.mark.parametrize("kind", ["rope", "rope --rotary-percent 0.5 --rotary-base 5000", "none"])
def test_positions_of_a_transformer_train(kind: str):
    """Megatron would fuse RoPE by Transformer Engine, and stop where there is none."""
    with pretrained(f"{TRANSFORMER} --position-embedding-type {kind}"):
        pass


@pytest.mark.parametrize("flag", ["--cuda-graph-impl local", "--enable-cuda-graph"])
def test_a_cpu_has_no_cuda_graphs(parse: Parse, flag: str):
    with pytest.raises(UsageError, match=re.escape(f"{flag} needs a CUDA device and none was")):
        parse(f"{TRANSFORMER} {flag}")


@pytest.mark.parametrize(
    ("system", "graph", "message"),
    [
        ("gmlp --token-router hash --num-experts 2", "local", "layers that route, and every layer"),
        ("gmlp", "full_iteration", "none of the Python.*--cuda-graph-impl local"),
        ("gmlp", "transformer_engine", "graphs of Transformer Engine are not made here"),
        ("aft", "local", "the host reads how large some numbers are"),
    ],
)
def test_graphs_that_the_host_would_have_to_enter(
    parse: Parse, system: str, graph: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cpu, "needed", lambda: False)
    with pytest.raises(UsageError, match=f"--cuda-graph-impl {graph.split()[0]}.*{message}"):
        parse(f"--architecture {system} --cuda-graph-impl {graph}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gmlp --hidden-dropout 0.1", "with dropout replays it in evaluations: give --hidden-dro"),
        ("amlp --attention-dropout 0.1", "with dropout replays it in evaluations"),
        ("gmlp --eval-tasks copa", "captures sequences of one length, and --eval-tasks scores"),
    ],
)
def test_graphs_that_an_evaluation_would_replay(
    parse: Parse, words: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    args = parse(f"--architecture {words} --eval-interval 2 --eval-iters 1")
    monkeypatch.setattr(cpu, "needed", lambda: False)
    with args.thawed():
        args.explicit_flags = {"cuda_graph_impl": "local"}
        with pytest.raises(UsageError, match=f"--cuda-graph-impl local.*{message}"):
            refuse_unused(args)


PARTLY = (
    "--architecture smlp --feature-router deterministic --num-feature-experts 2 "
    "--num-dense-layers 3 --token-router base --num-experts 2"
)


def test_layers_that_do_not_route_may_be_captured(parse: Parse, monkeypatch: pytest.MonkeyPatch):
    """By Megatron's implementation, which asks each layer."""
    args = parse(PARTLY)
    monkeypatch.setattr(cpu, "needed", lambda: False)
    with args.thawed():
        args.explicit_flags = {"cuda_graph_impl": "local"}
        refuse_unused(args)


def test_a_spec_says_which_architecture_it_is(parse: Parse):
    """As Megatron's own script is told; the record and the checks are of what is built."""
    args = parse("--spec megatron_smlp.architectures gmlp")
    assert args.architecture == "gmlp"
    forget_arguments()
    args = parse(f"{TRANSFORMER} --spec megatron_smlp.architectures transformer")
    spelt = model_config(args).transformer_layer_spec
    forget_arguments()
    assert spelt is model_config(parse(TRANSFORMER)).transformer_layer_spec


def test_a_first_start_may_be_forbidden(parse: Parse, tmp_path: Path):
    words = f"--architecture gmlp --load {tmp_path} --save {tmp_path}"
    assert parse(words).load is None
    forget_arguments()
    with pytest.raises(UsageError, match="holds no checkpoint"):
        parse(f"{words} --exit-on-missing-checkpoint")


def test_what_megatrons_configuration_refuses_is_one_line():
    message = "Megatron refuses these arguments: .*recompute_method"
    words = "--architecture gmlp --recompute-granularity full"
    with pytest.raises(UsageError, match=message), pretrained(words):
        pass


def test_a_dry_run_asks_megatrons_configuration_too():
    from pretrain_smlp import main

    words = f"{MINIMAL} --architecture gmlp --recompute-granularity full --dry-run"
    with pytest.raises(UsageError, match=r"Megatron refuses these .*recompute_method"):
        main(words.split())
    forget_arguments()


def test_rotary_scaling_has_the_factor_that_is_given(parse: Parse):
    words = "--position-embedding-type rope --use-rope-scaling --rope-scaling-factor 32"
    assert model_config(parse(f"{TRANSFORMER} {words}")).rope_scaling_factor == 32
