"""Runs that cannot start: one line with flag, value, what is allowed, what to do."""

from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.in_process import MINIMAL

from megatron_smlp.errors import UsageError
from megatron_smlp.flags import check_run
from megatron_smlp.flags.check_run import _check_validation_sets
from megatron_smlp.platform import cpu

Parse = Callable[..., Any]

GMLP = "--architecture gmlp"
SWITCH = f"{GMLP} --token-router switch --num-experts 2"
BY_SAMPLES = MINIMAL.replace("--train-iters 4", "--train-samples 10")


def refused(parse: Parse, words: str, message: str, *, base: str = MINIMAL) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(words, base=base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train-iters -3", r"--train-iters -3: give 1 or more"),
        ("--global-batch-size 0", r"--global-batch-size 0: give 1 or more"),
        ("--lr=-1e-3", r"--lr -0\.001: give 0 or more"),
        ("--lr nan", r"--lr nan: give 0 or more"),
        ("--min-lr -1", r"--min-lr -1\.0: give 0 or more"),
        ("--weight-decay -1", r"--weight-decay -1\.0: give 0 or more"),
        ("--lr-decay-iters 0", r"--lr-decay-iters 0: give 1 or more"),
        ("--log-interval 0", r"--log-interval 0: give 1 or more"),
        ("--init-method-std -0.1", r"--init-method-std -0\.1: give 0 or more"),
        ("--eval-iters -1", r"--eval-iters -1: give 0 or more"),
        ("--eval-interval -5", r"--eval-interval -5: give 0 or more"),
        ("--exit-interval -1", r"--exit-interval -1: give 0 or more"),
        ("--num-workers -1", r"--num-workers -1: give 0 or more"),
        ("--seed 0", r"--seed 0: give 1 or more"),
        ("--tensor-model-parallel-size 0", r"--tensor-model-parallel-size 0: give 1 or more"),
        ("--lr-warmup-fraction 1", r"--lr-warmup-fraction 1\.0: give 0 or more, and less than 1"),
        ("--hidden-dropout 2", r"--hidden-dropout 2\.0: give 0 or more, and less than 1"),
        ("--peak-tflops -3", r"--peak-tflops -3\.0: give a positive number, or leave it out"),
        ("--split a,b,c", r"--split a,b,c: give the shares .*95,5,0"),
        ("--split 110,-10,0", r"--split 110,-10,0: give the shares"),
        ("--split 0,100,0", r"--split 0,100,0 leaves nothing to train on"),
        ("--split 0,0,0", r"--split 0,0,0 leaves nothing to train on"),
        ("--split 100,0,0 --eval-iters 1 --eval-interval 2", r"--eval-iters 1 without data to val"),
        ("--split 1 --eval-iters 1 --eval-interval 2", r"--eval-iters 1 without data to val"),
        ("--train-data-path a --eval-iters 1 --eval-interval 2", r"--eval-iters 1 without data to"),
        ("--train-data-path a --valid-data-path b --split 9,1,0",
         r"--split 9,1,0 and --train-data-path exclude one another"),
        ("--cross-entropy-loss-fusion", r"--cross-entropy-loss-fusion without --bf16: "),
    ],
)  # fmt: skip
def test_numbers_that_no_run_can_use(parse: Parse, words: str, message: str):
    refused(parse, f"{GMLP} {words}", message)


WHOLE = "--full-validation --multiple-validation-sets --train-data-path t --valid-data-path"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{WHOLE} 0.3 a 0.7 b", r"evaluates each dataset alone, and weights would be passed over"),
        (f"{WHOLE} a b --validation-set-names x", r"--validation-set-names x: give 2 different na"),
        (f"{WHOLE} a b --validation-set-names x x", r"--validation-set-names x x: give 2 differen"),
        ("--validation-set-names x", r"--validation-set-names is for --multiple-validation-sets"),
    ],
)  # fmt: skip
def test_validation_sets(parse: Parse, words: str, message: str):
    base = MINIMAL.replace("--mock-data", "") if "data-path" in words else MINIMAL
    refused(parse, f"{GMLP} {words}", message, base=base)


def test_names_of_validation_sets(parse: Parse):
    words = f"{GMLP} {WHOLE} a b --validation-set-names x y"
    args = parse(words, base=MINIMAL.replace("--mock-data", ""))
    assert args.validation_set_names == ["x", "y"]
    with pytest.raises(UsageError, match="give 2 different names without blanks"):
        _check_validation_sets(Namespace(**vars(args) | {"validation_set_names": ["x", "y z"]}))


@pytest.mark.parametrize(
    ("words", "is_fused"),
    [("", True), ("--activation-func-clamp-value 7", False), ("--glu-linear-offset 1", False)],
)
def test_a_swiglu_that_the_fused_one_is_not(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, words: str, is_fused: bool
):
    """As on a GPU, where it is fused: Megatron's function clamps nothing, without a word."""
    monkeypatch.setattr(cpu, "set_flags", lambda args: None)
    architecture = "--architecture transformer --num-attention-heads 4"
    args = parse(f"{architecture} --swiglu --distributed-backend gloo {words}")
    assert args.bias_swiglu_fusion == is_fused


@pytest.mark.parametrize("freq", ["0", "-1", "[0,1]", "[0,1,2,1]"])
def test_moe_layers(parse: Parse, freq: str):
    message = r"--moe-layer-freq .*: give a number .* a list with 0 or 1 .*--num-layers 4 layers"
    refused(parse, f"{SWITCH} --moe-layer-freq {freq}", message)


@pytest.mark.parametrize(
    ("words", "base", "message"),
    [
        ("--train-samples 10", MINIMAL, r"--train-iters 4 and --train-samples 10 both say"),
        ("--lr-warmup-samples 20", BY_SAMPLES,
         r"--lr-warmup-samples 20 must be under .*--train-samples 10"),
        ("--lr-decay-style WSD", MINIMAL, r"WSD without --lr-wsd-decay-iters: say how long"),
        ("--lr-decay-style WSD", BY_SAMPLES, r"WSD without --lr-wsd-decay-samples: say how long"),
    ],
)  # fmt: skip
def test_the_length_of_a_run(parse: Parse, words: str, base: str, message: str):
    refused(parse, f"{GMLP} {words}", message, base=base)


def test_a_run_by_samples_saves_and_evaluates_at_its_end(parse: Parse, tmp_path):
    """Megatron wants intervals in iterations, which such a run does not know yet."""
    args = parse(f"{GMLP} --save {tmp_path} --eval-iters 0", base=BY_SAMPLES)
    assert args.save_interval >= 5
    assert args.eval_interval >= 5


@pytest.mark.parametrize(
    ("processes", "words", "message"),
    [
        (1, f"{GMLP} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
         r"--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2 needs a multiple of 4 "
         r"processes, and this run has 1: start so many by torchrun"),
        (1, f"{SWITCH} --expert-model-parallel-size 2",
         r"--expert-model-parallel-size 2 needs a multiple of 2 processes, and this run has 1"),
        (2, f"{GMLP} --global-batch-size 6",
         r"--global-batch-size 6 is not a multiple of 4, which is --micro-batch-size 2 on 2 data"),
    ],
)  # fmt: skip
def test_processes(parse: Parse, monkeypatch, processes: int, words: str, message: str):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    refused(parse, words, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", r"--tokenizer-type is missing: give it as --tokenizer-type HuggingFaceTokenizer"),
        ("--tokenizer-type NullTokenizer", r"NullTokenizer without --vocab-size: give the number"),
    ],
)
def test_tokenizers(parse: Parse, words: str, message: str):
    base = MINIMAL.replace("--tokenizer-type NullTokenizer --vocab-size 100", "")
    refused(parse, f"{GMLP} {words}", message, base=base)


def test_weights_and_biases_need_a_name_and_a_folder(parse: Parse):
    words = f"{GMLP} --wandb-project p --wandb-exp-name e"
    refused(parse, words, r"--wandb-project p needs --wandb-exp-name, and --save or --wandb-save")


@pytest.mark.parametrize(
    ("file", "variable"), [(".netrc", ""), ("_netrc", ""), ("anywhere", "~/anywhere")]
)
def test_a_login_is_found_where_weights_and_biases_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, variable: str
):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", variable)
    args = Namespace(wandb_project="p", wandb_exp_name="e", save="run")
    with pytest.raises(UsageError, match="--wandb-project p without a login"):
        check_run._check_wandb(args)
    (tmp_path / file).write_text("machine api.wandb.ai login user password key\n")
    check_run._check_wandb(args)


@pytest.mark.parametrize(("processes", "gpus"), [(2, 1), (8, 7)])
def test_every_process_of_a_machine_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, processes: int, gpus: int
):
    """The first one without says so; each may see its own alone (torchrun --virtual-local-rank)."""
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
    """Triton builds its driver when the first kernel is compiled, with Python's headers."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(check_run.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"neither gcc nor clang was found, .* in the variable CC"):
        check_run._check_compiler()
    monkeypatch.setenv("CC", "tcc")
    monkeypatch.setattr(check_run.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"Python\.h is missing, .*python3-dev"):
        check_run._check_compiler()
    (tmp_path / "Python.h").touch()
    check_run._check_compiler()


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed")
def test_layers_of_what_is_not_installed(parse: Parse, monkeypatch: pytest.MonkeyPatch):
    """A CPU takes the local ones whatever is given."""
    monkeypatch.setattr(cpu, "needed", lambda: False)
    monkeypatch.setenv("CC", "cc")
    words = f"{GMLP} --transformer-impl"
    refused(parse, f"{words} transformer_engine", "needs Transformer Engine, which is not inst")
    refused(parse, f"{words} inference_optimized", "inference_optimized is not for training: give")


def test_a_profile_needs_a_folder(parse: Parse, tmp_path: Path):
    words = f"{GMLP} --profile --use-pytorch-profiler"
    refused(parse, words, r"--use-pytorch-profiler .* there is none: give --log-dir, --save or --t")
    assert parse(f"{words} --log-dir {tmp_path}").tensorboard_dir == f"{tmp_path}/tensorboard"


@pytest.mark.parametrize("flag", ["--prefix-fraction 0.5", "--partial-loss all"])
def test_flags_of_partial_prediction_need_an_smlp(parse: Parse, flag: str):
    refused(parse, f"{GMLP} {flag}", rf"{flag} is for --architecture smlp, not gmlp: leave it out")
