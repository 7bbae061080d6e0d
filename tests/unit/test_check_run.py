"""Runs that cannot start: a one-line error with flag, value, what is allowed and what to do."""

import math
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.in_process import MINIMAL

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags import check_run
from megatron_smlp.flags.check_run import LEAST, UNDER_ONE, check_values
from megatron_smlp.options import OUR_FLAGS
from megatron_smlp.platform import cpu

Parse = Callable[..., Any]

GMLP = "--architecture gmlp"
EXPERTS = "--token-router switch --num-experts 2"
BY_SAMPLES = MINIMAL.replace("--train-iters 4", "--train-samples 10")


def refused(parse: Parse, flags: str, *, base: str = MINIMAL, message: str = "") -> None:
    """Check that `flags` are refused in one line, which by default names the first of them."""
    with pytest.raises(UsageError, match=message or f"^{flags.split()[0]}") as caught:
        parse(f"{GMLP} {flags}", base=base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*LEAST, *UNDER_ONE, "keep_last"])
def test_numbers_that_no_run_can_use(name: str):
    least = {"keep_last": 1, **LEAST}.get(name, 0)
    args = dict.fromkeys([*LEAST, *UNDER_ONE, *OUR_FLAGS])
    check_values(Namespace(**args | {name: least}))
    for value in (least - 1, math.nan, *([1.0] if name in UNDER_ONE else [])):
        with pytest.raises(UsageError, match=f"^{flag_of(name)} .*: give {least} or more"):
            check_values(Namespace(**args | {name: value}))


EVALUATED = "--eval-iters 1 --eval-interval 2"
WHOLE = "--full-validation --multiple-validation-sets --train-data-path t --valid-data-path"


@pytest.mark.parametrize(
    "flags",
    [
        *("--lr nan", "--peak-tflops -3", "--cross-entropy-loss-fusion"),
        *("--split a,b,c", "--split 110,-10,0", "--split 0,100,0", "--split 0,0,0"),
        "--valid-data-path x",
        f"{EVALUATED} --split 100,0,0",
        f"{EVALUATED} --split 1",
        "--full-validation --split 100,0,0",
        "--full-validation --data-path 0.7 a 0.3 b",
        f"{WHOLE} 1 a",
        "--profile-step-end 5 --profile --use-pytorch-profiler --tensorboard-dir t",
        f"{EVALUATED} --train-data-path a",
        "--split 9,1,0 --train-data-path a --valid-data-path b",
        "--mock-data --data-path x",
        "--mock-data --valid-data-path x",
        "--validation-set-names x",
        f"--multiple-validation-sets {WHOLE} 0.3 a 0.7 b",
        "--multiple-validation-sets --data-path a b --split 9,1,0",
        *("--split 1,1e-2", "--split 0.99,5e-3,5e-3"),
        f"--validation-set-names x {WHOLE} a b",
        f"--validation-set-names x x {WHOLE} a b",
        *("--step-batch-size-schedule 0:2", "--lr-decay-style WSD"),
        f"--moe-layer-freq 0 {EXPERTS}",
        f"--moe-layer-freq [0,1] {EXPERTS}",
        f"--moe-layer-freq [0,1,2,1] {EXPERTS}",
        "--vocab-size 100 --tokenizer-type HuggingFaceTokenizer",
        "--tokenizer-type GPT2BPETokenizer",
        *(f"--tokenizer-model {name}" for name in ("/none", "tests/none", "a/b/c")),
        *("--profile", "--use-pytorch-profiler --profile"),
        "--wandb-project p --wandb-exp-name e",
    ],
)
def test_what_cannot_start(parse: Parse, flags: str):
    base = MINIMAL.replace("--mock-data", "") if "data-path" in flags else MINIMAL
    refused(parse, flags, base=base)


@pytest.mark.parametrize(
    ("flags", "is_fused"),
    [("", True), ("--activation-func-clamp-value 7", False), ("--glu-linear-offset 1", False)],
)
def test_a_swiglu_that_the_fused_one_is_not(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, flags: str, is_fused: bool
):
    """On a GPU SwiGLU is fused, and Megatron's fused function silently ignores both flags."""
    monkeypatch.setattr(cpu, "set_flags", lambda args: None)
    architecture = "--architecture transformer --num-attention-heads 4"
    args = parse(f"{architecture} --swiglu --distributed-backend gloo {flags}")
    assert args.bias_swiglu_fusion == is_fused


@pytest.mark.parametrize(
    "flags", ["--lr-warmup-samples 20", "--lr-decay-style WSD", "--train-samples 1"]
)
def test_a_run_by_samples(parse: Parse, flags: str):
    refused(parse, flags, base=BY_SAMPLES)


def test_less_than_a_batch_that_follows_from_others(parse: Parse):
    base = BY_SAMPLES.replace("--global-batch-size 2", "")
    refused(parse, "--train-samples 1", base=base, message="^--train-samples 1 .* give 2 or more")


def test_a_run_by_samples_saves_and_evaluates_at_its_end(parse: Parse, tmp_path):
    """Megatron needs the intervals in iterations, which a run by samples does not know yet."""
    args = parse(f"{GMLP} --save {tmp_path} --eval-iters 0", base=BY_SAMPLES)
    assert args.save_interval >= 5
    assert args.eval_interval >= 5


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (1, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        (1, f"--expert-model-parallel-size 2 {EXPERTS}"),
        (2, "--global-batch-size 6"),
    ],
)
def test_processes(parse: Parse, monkeypatch: pytest.MonkeyPatch, processes: int, flags: str):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    refused(parse, flags)


def test_tokenizers(parse: Parse):
    base = MINIMAL.replace("--tokenizer-type NullTokenizer --vocab-size 100", "")
    refused(parse, "", base=base, message="--tokenizer-type is missing")
    refused(parse, "--tokenizer-type NullTokenizer", base=base)


@pytest.mark.parametrize(("processes", "gpus"), [(2, 1), (8, 7)])
def test_every_process_of_a_machine_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, processes: int, gpus: int
):
    """The first one without says so; each may see only its own (torchrun --virtual-local-rank)."""
    monkeypatch.setattr(check_run.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for number in range(gpus):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        check_run._check_devices()
    for number in range(gpus, processes + 1):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        message = rf"^{processes} processes on a machine with {gpus} GPU"
        with pytest.raises(UsageError, match=message) as refusal:
            check_run._check_devices()
        assert (refusal.value.speaker == "") == (number == gpus)


def test_a_gpu_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Triton builds its driver against Python's headers when it compiles the first kernel."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(check_run.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"neither gcc nor clang was found, .* or set CC to one"):
        check_run._check_compiler()
    monkeypatch.setenv("CC", "tcc")
    monkeypatch.setattr(check_run.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"Python\.h is missing, .*python3-dev"):
        check_run._check_compiler()
    (tmp_path / "Python.h").touch()
    check_run._check_compiler()


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed")
def test_layers_of_what_is_not_installed(parse: Parse, monkeypatch: pytest.MonkeyPatch):
    """A CPU always uses the local layers, so the test pretends that there is a GPU."""
    monkeypatch.setattr(cpu, "needed", lambda: False)
    monkeypatch.setenv("CC", "cc")
    refused(parse, "--transformer-impl transformer_engine")


def test_a_profile_has_a_folder_beside_the_log(parse: Parse, tmp_path: Path):
    flags = f"{GMLP} --profile --profile-step-end 4 --use-pytorch-profiler --log-dir {tmp_path}"
    assert parse(flags).tensorboard_dir == f"{tmp_path}/tensorboard"
