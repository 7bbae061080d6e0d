"""Megatron's flags are accepted if they are tested, and only where they have an effect."""

import ast
import re
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.in_process import MINIMAL, prepare_megatron, pretrained
from support.launches import REPOSITORY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_smlp import plugin_files
from megatron_smlp.accounting.costs import ModelShape
from megatron_smlp.checkpoints.folders import iterations
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.check_execution import check_cuda_graphs, check_fp16, check_muon
from megatron_smlp.flags.check_needs import NEEDS, VALUES
from megatron_smlp.flags.megatron_flags import RENAMED, TESTED, listed, refuse_untested, usable
from megatron_smlp.flags.model_arguments import model_arguments
from megatron_smlp.flags.parse import build_parser
from megatron_smlp.model import model_config
from megatron_smlp.options import OUR_FLAGS, model_defaults
from megatron_smlp.training.start_screen import summary

TRANSFORMER = "--architecture transformer --num-attention-heads 4"
EXPERTS = "--token-router base --num-experts 2"
MUON = "--architecture gmlp --optimizer muon"
GRAPHS = "--allow-untested-flag cuda-graph-impl"
UNTRAINED = (
    "cuda-graph-impl local",
    "fp8-format hybrid",
    "fp8-param-gather",
    "use-torch-fsdp2",
    "use-megatron-fsdp",
)
"""GPU flags that no test trains with."""
type Parse = Callable[..., Any]


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    prepare_megatron()
    return build_parser()


def _strings(tree: ast.Module) -> list[str]:
    """Return the string literals of a file, without its docstrings."""
    nodes = list(ast.walk(tree))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    texts = [node for node in nodes if isinstance(node, ast.Constant) and node not in docstrings]
    return [node.value for node in texts if isinstance(node.value, str)]


class TestTheList:
    def test_it_has_each_flag_of_megatrons_once(self, parser: ArgumentParser):
        actions = parser._option_string_actions
        assert listed() | set(RENAMED) <= set(actions)
        names = [name for names in TESTED.values() for name in names.split()]
        assert len(names) == len(set(names))
        dests = {actions[f"--{name}"].dest for name in names}
        assert not dests & set(OUR_FLAGS)
        checked = {*VALUES, *(name for need in NEEDS for name in need.flags)}
        assert checked - {"cuda_graph_impl"} <= usable(parser)  # --allow-untested-flag takes it

    def test_each_flag_is_in_a_test(self):
        """Or in a configuration, which the tests train; flags in docstrings do not count.

        For the two that report a device's memory, --log-memory-to-tensorboard and
        --record-memory-history, tests only check that a run on a CPU refuses them.
        """
        texts = [path.read_text("utf-8") for path in (REPOSITORY / "configs").rglob("*.yaml")]
        for path in (REPOSITORY / "tests").rglob("*.py"):
            texts += _strings(ast.parse(path.read_text("utf-8")))
        given = {
            flag or key.replace("_", "-")
            for text in texts
            for flag, key in re.findall(r"(?<![\w-])--([a-z][\w-]*)|^([\w-]+):", text, re.MULTILINE)
        }
        assert listed() - {f"--{name}" for name in given} == set()

    def test_every_other_flag_is_refused_unless_it_is_allowed(self, parser: ArgumentParser):
        others = [action for action in parser._actions if action.dest not in usable(parser)]
        assert len(others) > 500
        for action in others:
            for flag in action.option_strings:
                with pytest.raises(UsageError, match=f"{flag} is not among .*give "):
                    refuse_untested(parser, [f"{flag}=1"], allowed=("moe-layer",))
            for name in (flag[2:], action.dest):
                refuse_untested(parser, ["--lr", "1", flag], allowed=(name,))

    def test_all_are_named_at_once(self, parser: ArgumentParser):
        argv = ["--img-h", "1", "--use-flash-attn", "--patch-dim=2", "--img-h", "2", "--lr", "1"]
        with pytest.raises(UsageError) as refused:
            refuse_untested(parser, argv, allowed=())
        names = ("--img-h", "--use-flash-attn", "--patch-dim", "--attention-backend")
        assert all(name in str(refused.value) for name in names)

    @pytest.mark.parametrize("flags", UNTRAINED)
    def test_what_no_test_trains_with_is_refused(self, parse: Parse, flags: str):
        """And docs/gpus.md says so."""
        name = flags.split()[0]
        with pytest.raises(UsageError, match=f"^--{name} is not among .* that are tested"):
            parse(f"--architecture gmlp --{flags}")
        page = (REPOSITORY / "docs" / "gpus.md").read_text(encoding="utf-8")
        (row,) = [
            line for line in page.splitlines() if line.startswith("|") and f"--{name}" in line
        ]
        assert row.split(" | ")[1] == "no"
        assert "without `--allow-untested-flag" in row

    def test_it_is_refused_from_a_file_and_let_through_by_either(
        self, parse: Parse, tmp_path: Path
    ):
        path = tmp_path / "config.yaml"
        path.write_text("architecture: gmlp\nfim-spm-rate: 0.4\n")
        with pytest.raises(UsageError, match="--fim-spm-rate is not among"):
            parse(f"--config {path}")
        assert parse(f"--config {path} --allow-untested-flag fim-spm-rate").fim_spm_rate == 0.4
        with path.open("a") as file:
            file.write("allow-untested-flag: [fim_spm_rate]\n")
        more = "--fim-rate 0.5 --allow-untested-flag x --allow-untested-flag fim-rate y"
        assert parse(f"--config {path} {more}").allow_untested_flag[-1] == "y"

    def test_a_model_that_was_made_with_one_can_be_made_again(self, parser: ArgumentParser):
        flags = model_defaults() | {"num_layers": 3, "window_attn_skip_freq": 2}
        argv = model_arguments(parser, flags)
        refuse_untested(parser, argv, allowed=parser.parse_args(argv).allow_untested_flag)
        assert parser.parse_args(argv).window_attn_skip_freq == 2

    def test_the_page_says_which_of_the_most_used_flags_are_refused(self, parser: ArgumentParser):
        page = (REPOSITORY / "docs" / "from-megatron-lm.md").read_text(encoding="utf-8")
        page = page[page.index("## The 90 flags that") : page.index("## Existing checkpoints")]
        refused = re.findall(r"`(--[\w-]+)`\s\d+", page)
        assert len(refused) == 16
        assert not {parser._option_string_actions[flag].dest for flag in refused} & usable(parser)

    def test_flags_of_the_page_are_flags(self, parser: ArgumentParser):
        page = (REPOSITORY / "docs" / "from-megatron-lm.md").read_text(encoding="utf-8")
        page = page[page.index("## Other defaults") : page.index("## Existing checkpoints")]
        named = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*\w)(?![\w-])", page))
        assert len(named) > 40
        assert named - set(parser._option_string_actions) == set()


TRAINED = {
    "layers": f"""{TRANSFORMER} --squared-relu --norm-epsilon 1e-6 --add-qkv-bias
        --embedding-init-method-std 0.01 --attention-softmax-in-fp32 --no-masked-softmax-fusion
        --no-bias-dropout-fusion --no-bias-swiglu-fusion --no-persist-layer-norm --use-mcore-models
        --position-embedding-type rope --no-rope-fusion --no-position-embedding
        --rotary-percent 0.5 --rotary-base 5000 --rotary-interleaved --use-rope-scaling
        --rotary-seq-len-interpolation-factor 2 --rope-scaling-factor 4""",
    "rotary": f"""{TRANSFORMER} --use-rotary-position-embeddings --rotary-base 500000 --openai-gelu
        --no-bias-gelu-fusion --lr-warmup-init 1e-5 --lr-warmup-iters 2""",
    "no positions": f"{TRANSFORMER} --position-embedding-type none --softmax-type vanilla",
    "some rotary": f"{TRANSFORMER} --position-embedding-type rope --no-rope-freq 2 --qk-l2-norm",
    "precision": """--architecture gmlp --bf16 --adam-beta1 0.8 --adam-eps 1e-7
        --accumulate-allreduce-grads-in-fp32 --no-gradient-accumulation-fusion
        --use-distributed-optimizer --no-align-grad-reduce --no-check-for-nan-in-loss-and-grad""",
    "loop": """--architecture gmlp --bf16 --grad-reduce-in-bf16 --exit-signal-handler
        --rerun-mode disabled --manual-gc --no-manual-gc-eval --train-sync-interval 2
        --empty-unused-memory-level 1 --eval-global-batch-size 2 --eval-interval 2
        --disable-gloo-process-groups --distributed-timeout-seconds-after-init 60
        --no-create-attention-mask-in-dataloader --no-mmap-bin-files
        --num-dataset-builder-threads 2 --mid-level-dataset-surplus 0.01""",
    "reports": """--architecture gmlp --timing-log-level 2 --timing-log-option max
        --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard --log-memory-interval 2
        --no-log-loss-scale-to-tensorboard --log-world-size-to-tensorboard --log-interval 1
        --no-barrier-with-level-1-timing --tensorboard-dir {0}/curves --profile
        --use-pytorch-profiler --profile-ranks 0 --profile-step-start 1 --profile-step-end 2
        --pytorch-profiler-collect-shapes --pytorch-profiler-collect-callstack --record-shapes
        --nvtx-ranges --dump-param-to-param-group-map {0}/groups.json --wandb-project p
        --wandb-entity e --wandb-exp-name n --wandb-save-dir {0}""",
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_listed_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pretrained(TRAINED[name].format(tmp_path)):
        pass
    if name == "reports":
        curves = EventAccumulator(str(tmp_path / "curves")).Reload().Tags()["scalars"]
        assert {"forward-backward-time", "forward-compute-time", "iteration-time"} <= {*curves}


def test_what_is_listed_saves_and_loads(tmp_path: Path):
    flags = f"""--architecture gmlp --save {tmp_path} --save-interval 2 --ckpt-format torch_dist
        --async-save --async-strategy mcore --no-ckpt-fully-parallel-save
        --ckpt-assume-constant-structure --dist-ckpt-workers 1 --use-distributed-optimizer
        --dist-ckpt-optim-fully-reshardable --ckpt-fully-parallel-save-process-group dp"""
    with pretrained(f"{flags} --exit-interval 2"):
        assert iterations(tmp_path) == [2]
    load = """--exit-on-missing-checkpoint --use-checkpoint-opt_param-scheduler
        --ckpt-fully-parallel-load --ckpt-fully-parallel-load-exchange-algo broadcast
        --ckpt-fully-parallel-load-process-group dp --no-ckpt-load-validate-sharding-integrity"""
    with pretrained(f"{flags} {load}"):
        assert iterations(tmp_path) == [2, 4]


def test_a_run_by_samples_decays_by_samples(tmp_path: Path):
    """The steps to profile may end after its last one."""
    base = MINIMAL.replace("--train-iters 4", "--train-samples 8")
    flags = "--architecture gmlp --lr-decay-samples 6 --lr-warmup-samples 2 --lr-decay-style WSD"
    profile = f"--profile --use-pytorch-profiler --profile-step-start 2 --log-dir {tmp_path}"
    with pretrained(f"{flags} --lr-wsd-decay-samples 2 {profile} --profile-step-end 9", base=base):
        assert list((tmp_path / "torch_profile").iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        # Flags without something that they need; more of them are in test_what_works.py.
        f"--reset-position-ids {TRANSFORMER} --use-rotary-position-embeddings",
        "--muon-momentum 0.8 --architecture gmlp",
        f"--overlap-param-gather {MUON} --use-distributed-optimizer --overlap-grad-reduce",
        f"--use-distributed-optimizer {MUON}",
        f"--optimizer-checkpoint data_parallel {MUON}",
        f"--moe-router-group-topk 2 --moe-router-num-groups 2 {TRANSFORMER} --token-router topk "
        "--num-experts 4 --moe-router-topk 3",
        f"--apply-layernorm-1p {TRANSFORMER}",
        f"--attention-backend flash {TRANSFORMER}",
        "--group-query-attention --num-query-groups 2 --architecture amlp",
        *(
            f"{flag} --architecture amlp --position-embedding-type rope"
            for flag in ("--no-rope-freq 2", "--tiny-attention-width 9", "--kv-channels 32")
        ),
        f"--rotary-base 500000 {TRANSFORMER}",
        f"--rope-scaling-factor 32 {TRANSFORMER} --position-embedding-type rope",
        f"--num-query-groups 2 {TRANSFORMER}",
        f"--add-qkv-bias {TRANSFORMER} --disable-bias-linear",
        "--num-feature-experts 8 --architecture smlp",
        f"--moe-layer-freq 2 --architecture smlp {EXPERTS}",
        f"--num-experts 2 {TRANSFORMER} --token-router base --moe-layer-freq [0,0,0,0]",
        "--num-experts 2 --architecture smlp --num-dense-layers 4 --token-router base",
        f"--calculate-per-token-loss --architecture smlp --feature-router partial "
        f"--num-feature-experts 2 {EXPERTS}",
        "--keep-every 2 --architecture gmlp",
        "--eval-tasks-limit 2 --architecture gmlp",
        # Values that do not work.
        *(
            f"{flag} --architecture gmlp"
            for flag in (
                *("--optimizer sgd", "--muon-tp-mode blockwise --optimizer muon"),
                *("--ckpt-format torch", "--async-strategy nvrx", "--dataloader-type external"),
                *("--rerun-mode report_stats", "--transformer-impl inference_optimized"),
            )
        ),
        f"--position-embedding-type yarn {TRANSFORMER}",
        f"--softmax-type learnable {TRANSFORMER}",
        f"--moe-router-dtype fp64 {TRANSFORMER} {EXPERTS}",
        "--spec megatron.core foo --architecture gmlp",
        "--spec megatron_smlp.architectures amlp --architecture gmlp",
        # CUDA graphs without a CUDA device.
        f"--cuda-graph-impl local {TRANSFORMER} {GRAPHS}",
        f"--cuda-graph-impl full_iteration {TRANSFORMER} {GRAPHS}",
    ],
)
@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed")
def test_what_does_nothing_or_does_not_work(parse: Parse, flags: str):
    with pytest.raises(UsageError, match=f"^{flags.split()[0]}"):
        parse(flags)


def test_recomputation_of_what_no_layer_has(parse: Parse):
    flags = "--recompute-granularity selective --recompute-modules core_attn layernorm"
    with pytest.raises(UsageError, match="--recompute-modules"):
        parse(f"--architecture gmlp {flags}")


@pytest.mark.parametrize("name", TESTED["Experts"].split())
def test_flags_of_experts_that_are_not_there(parse: Parse, parser: ArgumentParser, name: str):
    """They would silently train a dense model."""
    action = parser._option_string_actions[f"--{name}"]
    value = "" if action.nargs == 0 else next(iter(action.choices or ["1"]))
    with pytest.raises(UsageError, match=f"^--{name}.* without --token-router"):
        parse(f"{TRANSFORMER} --{name} {value}")


@pytest.mark.parametrize(
    "flags",
    [
        f"{TRANSFORMER} --softmax-type vanilla --rotary-base 10000 --num-query-groups 1",
        "--architecture amlp --attention-dropout 0.1",
        f"--architecture gmlp --swiglu {EXPERTS}",
        "--architecture gmlp --squared-relu --position-embedding-type learned_absolute",
        "--architecture gmlp --dist-ckpt-workers 1",
        "--architecture smlp --num-feature-experts 8 --feature-router none",
    ],
)
def test_what_works_is_allowed(parse: Parse, flags: str):
    assert parse(flags)


@pytest.mark.parametrize(
    "flags",
    [
        "--data-args-path {}/data --memory-snapshot-path x",
        "--train-data-path a --valid-data-path b --test-data-path c --tokenizer-special-tokens d e",
    ],
)
def test_names_of_files_are_allowed(parse: Parse, flags: str, tmp_path: Path):
    (tmp_path / "data").write_text("1 a")
    flags = f"--architecture gmlp {flags.format(tmp_path)}"
    assert parse(flags, base=MINIMAL.replace("--mock-data", ""))


@pytest.mark.parametrize(
    ("system", "is_refused"),
    [
        ("gmlp --token-router hash --num-experts 2", True),  # every layer routes
        ("gmlp --hidden-dropout 0.1", True),
        ("amlp --attention-dropout 0.1", True),
        ("gmlp --eval-micro-batch-size 1", True),
        ("gmlp --eval-tasks copa", True),
        ("mixed --num-attention-heads 4", True),  # a plugin's order, which begins with attention
        (
            f"smlp --feature-router deterministic --num-feature-experts 2 --num-dense-layers 3 "
            f"{EXPERTS}",
            False,  # layers that do not route may be captured
        ),
    ],
)
def test_graphs_of_what_a_replay_would_not_do(parse: Parse, system: str, is_refused: bool):
    plugin_files.load(str(REPOSITORY / "tests" / "support" / "mixed_plugin.py"))
    args = parse(f"--architecture {system} --eval-interval 2 --eval-iters 1")
    args.cuda_graph_impl = "local"
    args.explicit_flags = {"cuda_graph_impl": "local"}
    raises = pytest.raises(UsageError, match="--cuda-graph-impl local replays")
    with raises if is_refused else nullcontext():
        check_cuda_graphs(args)


@pytest.mark.parametrize(("processes", "is_refused"), [(2, True), (4, False)])
def test_muon_beside_copies_of_experts_alone(parse: Parse, processes: int, is_refused: bool):
    args = parse(f"{MUON} --bf16 --token-router switch --num-experts 2")
    args.tensor_model_parallel_size, args.expert_tensor_parallel_size = 2, 1
    args.use_distributed_optimizer, args.world_size = True, processes
    raises = pytest.raises(UsageError, match="only experts have copies")
    with raises if is_refused else nullcontext():
        check_muon(args)


@pytest.mark.parametrize(("expert", "expert_tensor"), [(1, None), (1, 2), (2, None), (1, 1)])
def test_fp16_beside_experts_of_their_own_ranks(parse: Parse, expert: int, expert_tensor: Any):
    args = parse("--architecture gmlp --token-router switch --num-experts 2")
    args.fp16, args.tensor_model_parallel_size = True, 2
    args.expert_model_parallel_size, args.expert_tensor_parallel_size = expert, expert_tensor
    is_refused = expert > 1 or expert_tensor == 1
    with pytest.raises(UsageError, match="Give --bf16") if is_refused else nullcontext():
        check_fp16(args)


SPATIAL = "--feature-router deterministic --num-feature-experts 4"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("smlp", "no layer has experts: this model equals --architecture gmlp"),
        (f"smlp {EXPERTS}", "no spatial experts (--feature-router none)"),
        (f"smlp {SPATIAL}", "no token experts (--token-router none)"),
        (f"smlp {SPATIAL} {EXPERTS}", ""),
        ("gmlp", ""),
    ],
)
def test_an_smlp_that_is_less_is_said(parse: Parse, flags: str, said: str):
    args = parse(f"--architecture {flags}")
    notes = [line for line in summary(args, ModelShape.from_args(args)) if line[:4] == "note"]
    assert len(notes) == bool(said)
    assert said in "".join(notes)


def test_a_spec_says_which_architecture_it_is(parse: Parse):
    """As with Megatron's own script; the record and the checks describe the model that is built."""
    assert parse("--spec megatron_smlp.architectures gmlp").architecture == "gmlp"
    args = parse(f"{TRANSFORMER} --spec megatron_smlp.architectures transformer")
    spelt = model_config(args).transformer_layer_spec
    assert spelt is model_config(parse(TRANSFORMER)).transformer_layer_spec


def test_a_first_start_may_be_forbidden(parse: Parse, tmp_path: Path):
    flags = f"--architecture gmlp --load {tmp_path} --save {tmp_path}"
    assert parse(flags).load is None
    with pytest.raises(UsageError, match="holds no checkpoint"):
        parse(f"{flags} --exit-on-missing-checkpoint")


@pytest.mark.parametrize("dry_run", ["", "--dry-run"])
def test_what_megatrons_configuration_refuses_is_one_line(dry_run: str):
    flags = f"--architecture gmlp --recompute-granularity full {dry_run}"
    message = "Megatron refuses these arguments: .*recompute_method"
    with pytest.raises(UsageError, match=message), pretrained(flags):
        pass


def test_rotary_scaling_has_the_factor_that_is_given(parse: Parse):
    flags = "--position-embedding-type rope --use-rope-scaling --rope-scaling-factor 32"
    assert model_config(parse(f"{TRANSFORMER} {flags}")).rope_scaling_factor == 32
