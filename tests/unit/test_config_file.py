"""YAML files of flags, which the command line overrides; one-line errors for wrong files."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.in_process import MINIMAL
from yaml import safe_load as read_yaml_text

from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import TRACKER, iteration_folder
from megatron_smlp.checkpoints.model_record import model_flags
from megatron_smlp.checkpoints.run_record import write_records
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.yaml_file import read_yaml
from megatron_smlp.training.start_screen import print_dry_run

type Parse = Callable[..., Any]
GMLP = "--architecture gmlp"
TRANSFORMER = "--architecture transformer --num-attention-heads 4"


def test_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1.0e-3\nseed: 7\nbf16: true\nsplit: 9,1,0\na: [1, x]\nb: null\n"
                    "min-lr: 1e-3\nc: [-2E+5, .5e1, '1e-3', 1e]\n", "utf-8")  # fmt: skip
    assert read_yaml(path) == {
        "lr": 1e-3, "seed": 7, "bf16": True, "split": "9,1,0", "a": [1, "x"], "b": None,
        "min-lr": 1e-3, "c": [-2e5, 5.0, "1e-3", "1e"],
    }  # fmt: skip


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a config file."""

    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_flags_win_over_the_file_and_the_file_over_defaults(parse: Parse, yaml):
    path = yaml("lr: 2.0e-3\nseed: 7\narchitecture: gmlp\nspatial_heads: 4\n")
    base = MINIMAL.replace("--lr 1e-3", "")
    assert parse(f"--config {path}", base=base).lr == 2e-3
    args = parse(f"--config {path} --lr 5e-3 --spatial-heads 2", base=base)
    assert (args.lr, args.spatial_heads, args.seed) == (5e-3, 2, 7)
    assert parse(TRANSFORMER).seed == 1234, "Megatron's default"


@pytest.mark.parametrize("word", ["--config {}", "--config={}"])
def test_the_place_of_the_flag_does_not_matter(parse: Parse, yaml, word: str):
    path = yaml("architecture: gmlp\nseed: 7\n")
    assert parse(f"--seed 8 {word.format(path)}").seed == 8


def test_a_schedule_of_batches_wins_over_the_files_batch(parse: Parse, yaml):
    path = yaml("architecture: gmlp\nglobal-batch-size: 2\ntrain-iters: 4\n")
    base = MINIMAL.replace("--global-batch-size 2 --train-iters 4", "")
    args = parse(f"--config {path} --train-samples 8 --step-batch-size-schedule 0:4", base=base)
    assert args.step_batch_size_schedule == "0:4"


def test_of_several_files_a_later_one_wins(parse: Parse, yaml, tmp_path: Path):
    """--dry-run says, in lines that are valid YAML, where each value comes from."""
    path = yaml("architecture: gmlp\nseed: 7\nlr-warmup-iters: 1\nsplit: '9,1,0'\n")
    other = tmp_path / "other.yaml"
    other.write_text("lr-warmup-fraction: 0.5\nseed: 8\n")
    args = parse(f"--config {path} --seq-length 32 --attention-backend auto --config={other}")
    assert (args.seed, args.lr_warmup_fraction, args.lr_warmup_iters) == (8, 0.5, 0)
    console = Console(file=io.StringIO(), width=100, soft_wrap=True)
    print_dry_run(args, console)
    said = console.file.getvalue()
    assert re.search(rf"^seed: 8 +# {other}:2$", said, re.MULTILINE)
    assert re.search(rf"^architecture: gmlp +# {path}:1$", said, re.MULTILINE)
    assert re.search(r"^seq_length: 32 +# command line$", said, re.MULTILINE)
    values = read_yaml_text(said.partition("\n\n")[0].partition("\n")[2])
    assert (values["split"], values["attention_backend"]) == ("9,1,0", "auto")
    assert "lr_warmup_iters" not in values
    assert parse(f"--config {other} --config {path} {GMLP}").seed == 7


def test_switches_and_keys_of_both_spellings(parse: Parse, yaml):
    """A switch takes true or false, also where Megatron's flag is named by its negation."""
    text = """
untie-embeddings-and-output-weights: true
disable-bias-linear: false
allow_tokenizer_mismatch: true
spatial-heads: 4
"""
    args = parse(f"--config {yaml(text)} {GMLP}")
    assert args.untie_embeddings_and_output_weights
    assert args.add_bias_linear
    assert (args.allow_tokenizer_mismatch, args.spatial_heads) == (True, 4)
    flags = "--no-untie-embeddings-and-output-weights --no-allow-tokenizer-mismatch"
    args = parse(f"--config {yaml(text)} {GMLP} {flags}")
    assert not args.untie_embeddings_and_output_weights
    assert not args.allow_tokenizer_mismatch


def test_any_key_of_the_file_is_left_out_by_its_no(parse: Parse, yaml):
    path = yaml("seed: 7\nlr_warmup_fraction: 0.5\nfeature-aux-loss-coeff: 0.3\n")
    flags = "--no-seed --no-lr-warmup-fraction --no-feature-aux-loss-coeff"
    args = parse(f"--config {path} {GMLP} {flags}")
    assert (args.seed, args.lr_warmup_fraction) == (1234, None)
    assert args.feature_aux_loss_coeff == 0.01
    with pytest.raises(UsageError, match="--no-lr-decay-style is not"):
        parse(f"--config {path} {GMLP} --no-lr-decay-style")


def test_a_flag_stands_in_for_keys_of_the_file(parse: Parse, yaml):
    path = yaml("split: 9,1,0\ntrain_iters: 8\nlr_warmup_fraction: 0.5\nmock_data: true\n")
    base = MINIMAL.replace("--mock-data", "").replace("--train-iters 4", "")
    flags = f"--config {path} {GMLP}"
    data = "--train-data-path a --valid-data-path b"
    args = parse(f"{flags} {data}", base=base)
    assert (args.split, args.mock_data) == (None, False)
    assert (args.train_data_path, args.valid_data_path) == (["a"], ["b"])
    assert parse(f"{flags} --data-path a", base=base).split == "9,1,0"
    path.write_text(path.read_text() + "train-data-path: null\n")  # sets nothing
    assert parse(f"{flags} --data-path a", base=base).split == "9,1,0"
    args = parse(f"{flags} --train-samples 16 --lr-warmup-samples 2", base=base)
    assert (args.train_samples, args.lr_warmup_samples) == (16, 2)
    assert args.lr_warmup_fraction is None
    path = yaml("split: 9,1,0\ntrain-data-path: [a]\nvalid-data-path: [b]\nrecompute_method: block")
    path.write_text(path.read_text() + "\nrecompute_granularity: full\nrecompute_num_layers: 1\n")
    args = parse(f"--config {path} {GMLP} --train-iters 4", base=base)
    assert (args.split, args.recompute_method) == (None, "block")
    args = parse(f"--config {path} {GMLP} --train-iters 4 --recompute-activations", base=base)
    assert (args.recompute_granularity, args.recompute_method) == ("selective", None)
    assert args.recompute_num_layers is None


def test_a_no_key_holds_against_the_checkpoint_too(parse: Parse, yaml, tmp_path: Path):
    first = parse(f"{GMLP} --bf16 --seed 7 --platform cpu")
    folder = iteration_folder(tmp_path, 3)
    folder.mkdir()
    (tmp_path / TRACKER).write_text("3")
    write_records(folder, model_flags(first), {"command_line": first.command_line})
    integrity.seal(folder)
    flags = f"--use-checkpoint-args --load {tmp_path} --config"
    path = yaml("bf16: true\nclip-grad: 0.5\n")
    args = parse(f"{flags} {path} --no-bf16 --no-seed --no-clip-grad", base="")
    assert (args.bf16, args.seed, args.clip_grad) == (False, 1234, 1.0)
    assert args.platform == "auto", "a start's own"
    assert parse(f"{flags} {path}", base="").bf16
    assert parse(f"{flags} {path} --no-save", base="").save is None
    path = yaml(f"use-checkpoint-args: true\nload: {tmp_path}\nsave: {tmp_path / 'b'}\n")
    assert parse(f"--config {path} --no-save", base="").save is None
    with pytest.raises(UsageError, match="--no-bf17 is not a flag"):
        parse(f"{flags} {path} --no-bf17")


def test_lists(parse: Parse, yaml):
    """Several values for one flag, and a list that Megatron reads from one word."""
    text = "token-router: switch\nnum-experts: 2\nmoe-layer-freq: [0, 1, 0, 1]\n"
    args = parse(f"--config {yaml(text + 'iterations-to-skip: [3, 5]')} {TRANSFORMER}")
    assert args.moe_layer_freq == [0, 1, 0, 1]
    assert args.iterations_to_skip == [3, 5]
    text = text.replace("[0, 1, 0, 1]", "([0, 1])*2") + 'wandb-exp-name: "a, b"\n'
    args = parse(f"--config {yaml(text)} {TRANSFORMER}")
    assert (args.moe_layer_freq, args.wandb_exp_name) == ([0, 1, 0, 1], "a, b")


WRONG = {
    "seed: 1\nlr: fast": r"--config .*\.yaml:2: argument --lr: invalid float value: 'fast'",
    "architecture: gmpl": r"\.yaml:1: .*--architecture: invalid choice: 'gmpl'.*gmlp",
    "config: more.yaml": "'config' is a flag alone: a file has `include:`",
    "num-lyers: 4": "unknown key 'num-lyers': did you mean --num-layers",
    "zzzzqqqq: 4": "unknown key 'zzzzqqqq'.*docs/flags.md",
    "bf16: 1": "'bf16' is a switch: true or false, not 1",
    "lr: [": "cannot be read as YAML: .*line 1",
    "- lr": "must hold `flag: value` lines",
    "save: no": "'save' takes a value, not False: quote ",
    "iterations-to-skip: 3 5": r"'3 5' is a string: give a list, \[a, b\]",
    "a: &a {x: 1}\n<<: *a": "merges: write the keys out",
    "lr: {a: 1}": "'lr' is not a number",
    "lr: 1\nseed: 2\nlr: 3": "'lr' appears twice.*line 3",
    "num-layers: 1\nnum_layers: 3": "'num_layers' appears twice",
    "lr: 2001-01-01": "quote dates",
    "lr: !!python/object/apply:os.system [ls]": "cannot be read as YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_named(parse: Parse, yaml, text: str):
    path = yaml(text)
    with pytest.raises(UsageError, match=WRONG[text]) as error:
        parse(f"--config {path} {TRANSFORMER}")
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_wrong_value_of_the_command_line_is_not_the_file_s(parse: Parse, yaml):
    with pytest.raises(UsageError, match=r"^argument --lr: invalid float value: 'fast'"):
        parse(f"--config {yaml('lr: 0.1')} {TRANSFORMER} --lr fast")


def test_a_missing_file_is_named(parse: Parse, tmp_path: Path):
    with pytest.raises(UsageError, match=r"--config .*/none\.yaml: no such file"):
        parse(f"--config {tmp_path}/none.yaml")
