"""Command line and YAML -> checked arguments; and one readable line for what is wrong."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.in_process import MINIMAL
from support.launches import REPOSITORY, clean_environment
from yaml import safe_load as read_yaml_text

from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import TRACKER, iteration_folder
from megatron_smlp.checkpoints.model_record import model_flags
from megatron_smlp.checkpoints.run_record import write_records
from megatron_smlp.errors import UsageError
from megatron_smlp.platform import cpu
from megatron_smlp.restart_note import RESTART
from megatron_smlp.routers.hash_table import balanced_table, table_as_json
from megatron_smlp.systems import TOKEN_ROUTERS
from megatron_smlp.training.start_screen import print_dry_run

Parse = Callable[..., Any]

GMLP = "--architecture gmlp"
SMLP = """
    --architecture smlp --num-dense-layers 2 --feature-router deterministic --num-feature-experts 4
"""
PARTIAL = SMLP.replace("deterministic", "partial")
TRANSFORMER = "--architecture transformer --num-attention-heads 4"


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a config file."""

    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """As if a launcher had started so many processes."""
    return lambda count: monkeypatch.setenv("WORLD_SIZE", str(count))


class TestConfigFile:
    def test_flags_win_over_the_file_and_the_file_over_defaults(self, parse: Parse, yaml):
        path = yaml("lr: 2.0e-3\nseed: 7\narchitecture: gmlp\nspatial_heads: 4\n")
        base = MINIMAL.replace("--lr 1e-3", "")
        assert parse(f"--config {path}", base=base).lr == 2e-3
        args = parse(f"--config {path} --lr 5e-3 --spatial-heads 2", base=base)
        assert (args.lr, args.spatial_heads, args.seed) == (5e-3, 2, 7)
        assert parse(TRANSFORMER).seed == 1234, "Megatron's default"

    @pytest.mark.parametrize("word", ["--config {}", "--config={}"])
    def test_the_place_of_the_flag_does_not_matter(self, parse: Parse, yaml, word: str):
        path = yaml("architecture: gmlp\nseed: 7\n")
        assert parse(f"--seed 8 {word.format(path)}").seed == 8

    def test_of_several_files_a_later_one_wins(self, parse: Parse, yaml, tmp_path: Path):
        """And --dry-run says which has given what, in lines that are YAML."""
        path = yaml("architecture: gmlp\nseed: 7\nlr-warmup-iters: 1\nsplit: '9,1,0'\n")
        other = tmp_path / "other.yaml"
        other.write_text("lr-warmup-fraction: 0.5\nseed: 8\n")
        args = parse(f"--config {path} --seq-length 32 --config={other}")
        assert (args.seed, args.lr_warmup_fraction, args.lr_warmup_iters) == (8, 0.5, 0)
        console = Console(file=io.StringIO(), width=100, soft_wrap=True)
        print_dry_run(args, console)
        said = console.file.getvalue()
        assert re.search(rf"^seed: 8 +# {other}:2$", said, re.MULTILINE)
        assert re.search(rf"^architecture: gmlp +# {path}:1$", said, re.MULTILINE)
        assert re.search(r"^seq_length: 32 +# command line$", said, re.MULTILINE)
        values = read_yaml_text(said.partition("\n\n")[0].partition("\n")[2])
        assert values["split"] == "9,1,0"
        assert "lr_warmup_iters" not in values
        assert parse(f"--config {other} --config {path} {GMLP}").seed == 7

    def test_keys_may_have_hyphens_or_underscores(self, parse: Parse, yaml):
        args = parse(f"--config {yaml('spatial-heads: 4')} {GMLP}")
        assert args.spatial_heads == 4
        args = parse(f"--config {yaml('spatial_heads: 2')} {GMLP}")
        assert args.spatial_heads == 2

    def test_switches(self, parse: Parse, yaml):
        """true and false for a flag without a value, also where Megatron names it by its no-."""
        text = "untie-embeddings-and-output-weights: true\ndisable-bias-linear: false\n"
        args = parse(f"--config {yaml(text)} {GMLP}")
        assert args.untie_embeddings_and_output_weights
        assert args.add_bias_linear

    def test_a_switch_of_the_file_is_put_out_by_its_no(self, parse: Parse, yaml):
        path = yaml("untie_embeddings_and_output_weights: true\n")
        args = parse(f"--config {path} {GMLP} --no-untie-embeddings-and-output-weights")
        assert not args.untie_embeddings_and_output_weights

    def test_any_key_of_the_file_is_left_out_by_its_no(self, parse: Parse, yaml):
        path = yaml("seed: 7\nlr_warmup_fraction: 0.5\nfeature-aux-loss-coeff: 0.3\n")
        words = "--no-seed --no-lr-warmup-fraction --no-feature-aux-loss-coeff"
        args = parse(f"--config {path} {GMLP} {words}")
        assert (args.seed, args.lr_warmup_fraction) == (1234, None)
        assert args.feature_aux_loss_coeff == 0.01
        refusal(parse, f"--config {path} {GMLP} --no-lr-decay-style", "--no-lr-decay-style is not")

    def test_a_flag_stands_in_for_keys_of_the_file(self, parse: Parse, yaml):
        path = yaml("split: 9,1,0\ntrain_iters: 8\nlr_warmup_fraction: 0.5\nmock_data: true\n")
        base = MINIMAL.replace("--mock-data", "").replace("--train-iters 4", "")
        words = f"--config {path} {GMLP}"
        data = "--train-data-path a --valid-data-path b"
        args = parse(f"{words} {data}", base=base)
        assert (args.split, args.mock_data) == (None, False)
        assert (args.train_data_path, args.valid_data_path) == (["a"], ["b"])
        assert parse(f"{words} --data-path a", base=base).split == "9,1,0"
        args = parse(f"{words} --train-samples 16 --lr-warmup-samples 2", base=base)
        assert (args.train_samples, args.lr_warmup_samples) == (16, 2)
        assert args.lr_warmup_fraction is None
        path = yaml(
            "split: 9,1,0\ntrain-data-path: [a]\nvalid-data-path: [b]\nrecompute_method: block"
        )
        path.write_text(
            path.read_text() + "\nrecompute_granularity: full\nrecompute_num_layers: 1\n"
        )
        args = parse(f"--config {path} {GMLP} --train-iters 4", base=base)
        assert (args.split, args.recompute_method) == (None, "block")
        args = parse(f"--config {path} {GMLP} --train-iters 4 --recompute-activations", base=base)
        assert (args.recompute_granularity, args.recompute_method) == ("selective", None)
        assert args.recompute_num_layers is None

    def test_a_warm_up_in_the_other_unit_is_named(self, parse: Parse, yaml):
        path = yaml("lr_warmup_iters: 2\n")
        base = MINIMAL.replace("--train-iters 4", "--train-samples 16")
        message = "--lr-warmup-iters 2 beside --train-samples 16: .*--lr-warmup-samples"
        with pytest.raises(UsageError, match=message):
            parse(f"--config {path} {GMLP}", base=base)

    def test_a_flag_stands_in_for_another_of_its_kind(self, parse: Parse, yaml):
        path = yaml("fp16: true\nrecompute-activations: true\n")
        full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        args = parse(f"--config {path} {GMLP} --bf16 {full}")
        assert (args.bf16, args.fp16, args.recompute_granularity) == (True, False, "full")

    def test_a_no_key_holds_against_the_checkpoint_too(self, parse: Parse, yaml, tmp_path: Path):
        first = parse(f"{GMLP} --bf16 --seed 7 --platform cpu")
        checkpoint(first, tmp_path)
        folder = iteration_folder(tmp_path, 3)
        write_records(folder, model_flags(first), {"command_line": first.command_line})
        integrity.seal(folder)
        words = f"--use-checkpoint-args --load {tmp_path} --config"
        path = yaml("bf16: true\nclip-grad: 0.5\n")
        args = parse(f"{words} {path} --no-bf16 --no-seed --no-clip-grad", base="")
        assert (args.bf16, args.seed, args.clip_grad) == (False, 1234, 1.0)
        assert args.platform == "auto", "a start's own"
        assert parse(f"{words} {path}", base="").bf16
        assert parse(f"{words} {path} --no-save", base="").save is None
        refusal(parse, f"{words} {path} --no-bf17", "--no-bf17 is not a flag")

    def test_our_own_switches_have_both_forms(self, parse: Parse, yaml):
        path = yaml("allow-tokenizer-mismatch: true\n")
        assert parse(f"--config {path} {GMLP}").allow_tokenizer_mismatch
        args = parse(f"--config {path} {GMLP} --no-allow-tokenizer-mismatch")
        assert not args.allow_tokenizer_mismatch

    def test_lists(self, parse: Parse, yaml):
        """Several values for one flag, and a list that Megatron reads as one word."""
        text = "token-router: switch\nnum-experts: 2\nmoe-layer-freq: [0, 1, 0, 1]\n"
        args = parse(f"--config {yaml(text + 'iterations-to-skip: [3, 5]')} {TRANSFORMER}")
        assert args.moe_layer_freq == [0, 1, 0, 1]
        assert args.iterations_to_skip == [3, 5]
        text = text.replace("[0, 1, 0, 1]", "([0, 1])*2") + 'wandb-exp-name: "a, b"\n'
        args = parse(f"--config {yaml(text)} {TRANSFORMER}")
        assert (args.moe_layer_freq, args.wandb_exp_name) == ([0, 1, 0, 1], "a, b")

    def test_null_is_the_default(self, parse: Parse, yaml):
        assert parse(f"--config {yaml('num-experts: null')} {GMLP}").num_experts is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("num-lyers: 4", r"unknown key 'num-lyers': did you mean --num-layers"),
            ("spatial_head: 4", r"unknown key 'spatial_head': did you mean --spatial-heads"),
            ("zzzzqqqq: 4", r"unknown key 'zzzzqqqq'.*--help"),
            ("bf16: 1", r"'bf16' is a switch: true or false, not 1"),
            ("lr: [", "cannot be read as YAML: .*line 1"),
            ("- lr", "must hold `flag: value` lines"),
            ("just text", "must hold `flag: value` lines"),
            ("lr: fast", "argument --lr: invalid float value: 'fast'"),
            ("architecture: gmpl", "--architecture: invalid choice: 'gmpl'.*gmlp"),
            ("save: no", "'save' takes a value, and False is a switch's: .*quotes"),
            ("iterations-to-skip: 3 5", r"'3 5' is one text: give a list, as \[a, b\]"),
        ],
    )
    def test_a_wrong_file_is_named(self, parse: Parse, yaml, text: str, message: str):
        path = yaml(text)
        error = refusal(parse, f"--config {path} {TRANSFORMER}", message)
        if not message.startswith(("argument", "--arch")):
            assert str(path) in error

    def test_a_missing_file_is_named(self, parse: Parse, tmp_path: Path):
        refusal(parse, f"--config {tmp_path}/none.yaml", r"--config .*/none\.yaml: no such file")


def refusal(parse: Parse, words: str, message: str) -> str:
    """The text of the refusal: one line that matches `message`."""
    with pytest.raises(UsageError) as caught:
        parse(words)
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(message, text), text
    return text


class TestRefusals:
    """Flag, value, what is allowed, what to do."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--spatial-head 4", r"--spatial-head is not a flag: did you mean --spatial-heads"),
            ("--spatial_heads=4", r"--spatial_heads is not a flag: did you mean --spatial-heads"),
            ("stray", "'stray' belongs to no flag"),
            ("--num-layers 0", "--num-layers 0: give a positive number"),
            ("--seq-length -1", "--seq-length -1: give a positive number"),
            ("--num-layers many", "argument --num-layers: invalid int value: 'many'"),
        ],
    )
    def test_flags(self, parse: Parse, words: str, message: str):
        refusal(parse, f"{GMLP} {words}", message)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (f"{GMLP} --spatial-heads 3", r"--spatial-heads 3 does not divide the gate width 32.*"
             r"--ffn-hidden-size 64.*choose a divisor"),
            (f"{GMLP} --spatial-heads 0", r"--spatial-heads 0 does not divide"),
            (f"{SMLP} --num-feature-experts 5", r"--num-feature-experts 5 does not divide the gate "
             r"width 32"),
            (f"{SMLP} --num-feature-experts 1", r"--num-feature-experts 1 .*not a mixture: give 2"),
            (f"{SMLP} --num-dense-layers 5", r"--num-dense-layers 5 must lie between 0 and "
             r"--num-layers 4"),
            (f"{SMLP} --num-dense-layers -1", r"--num-dense-layers -1 must lie between 0 and"),
            (f"{GMLP} --num-dense-layers 2", r"--num-dense-layers 2 is for --architecture smlp, "
             r"not gmlp: leave it out"),
            (f"{TRANSFORMER} --toeplitz", r"--toeplitz is for --architecture gmlp, amlp, "
             r"smlp or mixer, not transformer"),
            (f"{TRANSFORMER} --feature-router deterministic", r"--feature-router deterministic "
             r"is for --architecture smlp, not transformer: leave it out"),
            ("--num-attention-heads 5", r"--num-attention-heads 5 does not divide --hidden-size "
             r"32"),
        ],
    )  # fmt: skip
    def test_shapes(self, parse: Parse, words: str, message: str):
        refusal(parse, words, message)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--num-experts 4", r"--num-experts 4 without --token-router: choose one of "
             rf"{', '.join(TOKEN_ROUTERS)}, or leave"),
            ("--token-router base", r"--token-router base without --num-experts: give"),
            ("--token-router gshard --num-experts 1", r"--num-experts 1 is too few for "
             r"--token-router gshard: give 2"),
            ("--token-router best --num-experts 4", r"--token-router: invalid choice: 'best'"),
            ("--token-router switch --num-experts 4 --moe-train-capacity-factor 0",
             r"--moe-train-capacity-factor 0 must be over 0"),
            ("--token-router gshard --num-experts 4 --moe-eval-capacity-factor -1.5",
             r"--moe-eval-capacity-factor -1\.5 must be over 0"),
            ("--token-router base --num-experts 4 --moe-train-capacity-factor 1",
             r"--moe-train-capacity-factor 1.0 is for --token-router switch or gshard, not base"),
            ("--token-router hash --num-experts 4 --moe-aux-loss-coeff 0.1",
             r"--moe-aux-loss-coeff is for --token-router switch, gshard or topk, not hash"),
            ("--token-router switch --num-experts 4 --moe-aux-loss-coeff 0.1 0.2",
             r"--moe-aux-loss-coeff 0\.1 0\.2: give one number"),
            ("--token-router topk --num-experts 4 --moe-router-load-balancing-type none "
             "--moe-aux-loss-coeff 0.1", "has no loss to weigh: there is none. Give"),
            ("--token-router switch --num-experts 4 --moe-router-topk 2",
             r"--moe-router-topk 2 contradicts --token-router switch, with which a token visits 1"),
            ("--token-router switch --num-experts 4 --moe-expert-capacity-factor 1",
             r"--moe-expert-capacity-factor is for Megatron's own routing, .* leave it out"),
            ("--token-router hash --num-experts 4 --moe-enable-routing-replay",
             r"--moe-enable-routing-replay is for Megatron's own routing, .* leave it out"),
            ("--token-router switch --num-experts 4 --moe-apply-probs-on-input",
             r"--moe-apply-probs-on-input .* scales its output. Leave it out"),
            ("--token-router switch --num-experts 4 --moe-latent-size 16",
             "--moe-latent-size is not available with --token-router switch: .* Leave it out"),
            ("--token-router base --num-experts 4 --moe-shared-expert-intermediate-size 16",
             "--moe-shared-expert-intermediate-size is not available .*: there are no shared"),
            ("--token-router base --num-experts 4 --moe-use-upcycling", "--upcycle"),
            ("--token-router base --num-experts 4 --moe-router-dtype fp64",
             "--moe-router-dtype fp64: .* Give fp32, or leave it out"),
        ],
    )  # fmt: skip
    def test_token_routers(self, parse: Parse, words: str, message: str):
        refusal(parse, f"{TRANSFORMER} {words}", message)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (f"{PARTIAL} --prefix-fraction 0", r"--prefix-fraction 0 of --seq-length 16 is a "
             r"prefix of 0 tokens: it must lie between 0 and 1"),
            (f"{PARTIAL} --prefix-fraction 1", r"--prefix-fraction 1 .*between 0 and 1"),
            (f"{PARTIAL} --prefix-fraction -0.2", r"--prefix-fraction -0\.2 .*between 0 and 1"),
            (f"{PARTIAL} --prefix-fraction 0.01", r"--prefix-fraction 0\.01 .* at least one token"),
            (f"{PARTIAL} --feature-aux-loss-coeff -1", r"--feature-aux-loss-coeff -1.0: give 0 or"),
            (f"{PARTIAL} --num-feature-chunks 3", r"--num-feature-chunks 3 does not divide"),
            (f"{PARTIAL} --partial-loss some", r"--partial-loss: invalid choice: 'some'"),
            (f"{SMLP} --prefix-fraction 0.5", r"--prefix-fraction 0.5 is for --feature-router "
             r"partial, not deterministic: leave it out"),
            (f"{SMLP} --num-feature-chunks 8", r"--num-feature-chunks 8 with --feature-router "
             r"deterministic must be --num-feature-experts 4"),
            (f"{GMLP} --feature-router partial", r"--feature-router partial is for --architecture "
             r"smlp, not gmlp"),
            (f"{GMLP} --tiny-attention-width 32", r"--tiny-attention-width 32 is for "
             r"--architecture amlp, not gmlp"),
            ("--architecture amlp --tiny-attention-width 0", r"--tiny-attention-width 0: give 1"),
        ],
    )  # fmt: skip
    def test_feature_routers_and_tiny_attention(self, parse: Parse, words: str, message: str):
        refusal(parse, words, message)

    @pytest.mark.parametrize(
        ("vocabulary", "experts", "message"),
        [
            (
                50,
                4,
                r"is for a vocabulary of 50 ids, but the tokenizer has 100: .*build_hash_table",
            ),
            (100, 2, r"is for 2 experts, not for --num-experts 4"),
            (100, 4, None),
        ],
    )
    def test_hash_tables(self, parse: Parse, tmp_path: Path, vocabulary, experts, message):
        path = tmp_path / "table.json"
        table = balanced_table(np.arange(vocabulary), num_experts=experts)
        path.write_text(table_as_json(table, num_experts=experts))
        words = f"{TRANSFORMER} --token-router hash --num-experts 4 --hash-table {path}"
        if message is None:
            assert parse(words).hash_table == str(path)
        else:
            refusal(parse, words, message)

    def test_hash_tables_that_are_none(self, parse: Parse, tmp_path: Path):
        router = f"{TRANSFORMER} --token-router hash --num-experts 4 --hash-table"
        refusal(parse, f"{router} {tmp_path}/none.json", r"none\.json cannot be read .*build_hash")
        path = tmp_path / "table.json"
        path.write_text("[1, 2]")
        refusal(parse, f"{router} {path}", r"is not a hash table: tools/build_hash_table\.py makes")
        words = f"{TRANSFORMER} --token-router base --num-experts 4 --hash-table {path}"
        refusal(parse, words, r"--hash-table .* is for --token-router hash, not base: leave it out")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (f"{GMLP} --spatial-heads 2 --tensor-model-parallel-size 4",
             r"--tensor-model-parallel-size 4 does not divide --spatial-heads 2: choose a divisor, "
             r"or a single head"),
            (f"{SMLP} --num-feature-experts 2 --tensor-model-parallel-size 4",
             r"--tensor-model-parallel-size 4 does not divide --num-feature-experts 2"),
            (f"{TRANSFORMER} --tensor-model-parallel-size 8",
             r"--tensor-model-parallel-size 8 does not divide --num-attention-heads 4"),
            (f"{GMLP} --context-parallel-size 2",
             r"--context-parallel-size 2 is not available with spatial gating.*Leave it out"),
            (f"{SMLP} --context-parallel-size 2", r"--context-parallel-size 2 is not available"),
            (f"{TRANSFORMER} --context-parallel-size 2",
             r"--context-parallel-size 2 is not available: each rank reads whole sequences"),
            (f"{GMLP} --tensor-model-parallel-size 2 --micro-batch-size 2 --full-validation "
             "--multiple-validation-sets",
             r"--full-validation reads sample by sample, .* of 2: give --eval-micro-batch-size 1"),
            (f"{GMLP} --padded-vocab-size 102 --tensor-model-parallel-size 4 "
             "--global-batch-size 4",
             r"--padded-vocab-size 102 is not a multiple of --tensor-model-parallel-size 4: give"),
            ("--architecture aft --num-attention-heads 1 --tensor-model-parallel-size 2",
             r"does not divide --num-attention-heads 1: choose a divisor, or leave it out"),
            (f"{PARTIAL} --num-feature-chunks 1 --tensor-model-parallel-size 2",
             r"size 2 does not divide --num-feature-chunks 1: choose a divisor, or leave it out"),
            (f"{SMLP} --expert-model-parallel-size 2",
             r"--expert-model-parallel-size 2 without --num-experts"),
            (f"{SMLP} --token-router switch --num-experts 3 --expert-model-parallel-size 2",
             r"--num-experts 3 is not a multiple of --expert-model-parallel-size 2"),
        ],
    )  # fmt: skip
    def test_layouts(self, parse: Parse, processes, words: str, message: str):
        processes(8)
        refusal(parse, words, message)

    def test_what_only_megatron_knows_is_one_line_too(self, parse: Parse):
        words = f"{GMLP} --lr-warmup-iters 1 --lr-warmup-fraction 0.5"
        refusal(parse, words, r"Megatron refuses these arguments: can only specify one of lr-warm")

    @pytest.mark.skipif(not cpu.needed(), reason="there is a CUDA device, which has these")
    @pytest.mark.parametrize("flag", ["--fp16", "--tp-comm-overlap"])
    def test_what_only_a_gpu_has(self, parse: Parse, flag: str):
        refusal(parse, f"{GMLP} {flag}", rf"{flag} needs a CUDA device and none was found\. Leave")

    def test_another_sequence_length_than_the_checkpoints(self, parse: Parse, tmp_path: Path):
        checkpoint(parse(GMLP), tmp_path)
        message = (
            rf"--seq-length 8 contradicts the checkpoint {tmp_path}, .* made with 16: give --s"
        )
        refusal(parse, f"{GMLP} --load {tmp_path} --seq-length 8", message)

    @pytest.mark.parametrize(
        ("words", "flag"),
        [
            ("--spatial-heads 2", "--spatial-heads 2"),
            ("--num-layers 2", "--num-layers 2"),
            ("--hidden-size 16", "--hidden-size 16"),
            ("--ffn-hidden-size 128", "--ffn-hidden-size 128"),
            ("--architecture transformer --num-attention-heads 4", "--architecture transformer"),
        ],
    )
    def test_another_model_than_the_checkpoints(self, parse: Parse, tmp_path, words, flag):
        checkpoint(parse(GMLP), tmp_path)
        refusal(parse, f"{GMLP} --load {tmp_path} {words}", f"{flag} contradicts the checkpoint")

    def test_the_same_model_is_loaded(self, parse: Parse, tmp_path: Path):
        """And a run that finds its own checkpoint under --save goes on from it, unasked."""
        checkpoint(parse(TRANSFORMER), tmp_path)
        words = f"{TRANSFORMER} --load {tmp_path} --lr 1e-4 --micro-batch-size 1"
        assert parse(words).load == str(tmp_path)
        assert parse(f"{TRANSFORMER} --save {tmp_path} --save-interval 5").load == str(tmp_path)
        words = f"{TRANSFORMER} --save {tmp_path} --save-interval 5 --no-resume"
        assert parse(words).load is None

    def test_a_load_without_a_checkpoint_is_no_start_from_scratch(self, parse: Parse, tmp_path):
        """Megatron would train from random weights after a slip of the keyboard."""
        checkpoint(parse(GMLP), tmp_path)
        none = tmp_path / "none"
        refusal(parse, f"{GMLP} --load {none}", rf"--load {none} is not a folder: give the --save")
        none.mkdir()
        words = f"{GMLP} --load {none} --save {tmp_path}/new"
        refusal(parse, words, "none holds no checkpoint: give")
        one = iteration_folder(tmp_path, 3)
        message = rf"--load {one} is one checkpoint.*give --load {tmp_path} --ckpt-step 3\."
        refusal(parse, f"{GMLP} --load {one}", message)

    def test_launchers_give_one_folder_to_load_and_to_save(self, parse: Parse, tmp_path: Path):
        assert parse(f"{GMLP} --load {tmp_path}/run --save {tmp_path}/run").load is None
        (tmp_path / "run").mkdir()
        checkpoint(parse(GMLP), tmp_path / "run")
        words = f"{GMLP} --load {tmp_path}/run --save {tmp_path}/run/"
        assert parse(words).load == f"{tmp_path}/run"
        assert parse(f"{words} --no-resume").load is None
        assert parse(f"{words} --no-resume --finetune").load == f"{tmp_path}/run"
        message = "--ckpt-step 3 asks for a checkpoint, and --no-resume leaves"
        refusal(parse, f"{words} --no-resume --ckpt-step 3", message)

    def test_started_again_it_goes_on_from_its_own_checkpoint(self, parse: Parse, tmp_path: Path):
        """A queue starts the same command again, which began with another run's weights."""
        theirs, ours = tmp_path / "theirs", tmp_path / "ours"
        for folder in (theirs, ours):
            folder.mkdir()
        words = f"{GMLP} --load {theirs} --ckpt-step 3 --finetune --no-load-optim --save {ours}"
        checkpoint(parse(GMLP), theirs)
        first = parse(words)
        assert (first.load, first.ckpt_step, first.finetune) == (str(theirs), 3, True)
        checkpoint(parse(GMLP), ours)
        again = parse(words)
        assert (again.load, again.ckpt_step, again.finetune) == (str(ours), None, False)
        assert not again.no_load_optim
        assert parse(f"{words} --no-resume").load == str(theirs)

    @pytest.mark.parametrize("how", ["--no-resume", "--ckpt-step 2", "--load {} --ckpt-step 2"])
    def test_a_restart_does_not_go_back(
        self, parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ):
        """Where this command has saved something, what it says of its start is done."""
        words = f"{GMLP} --save {tmp_path} {how.format(tmp_path)}"
        checkpoint(parse(GMLP), tmp_path)
        by_hand = parse(words)
        wanted = None if how == "--no-resume" else str(tmp_path)
        assert (by_hand.load, by_hand.ckpt_step) == (wanted, 2 if "step" in how else None)
        monkeypatch.setenv(RESTART, '{"cause": "x", "noticed": 0}')
        assert parse(words).load == wanted  # another command has made that checkpoint
        folder = iteration_folder(tmp_path, 3)
        write_records(folder, model_flags(by_hand), {"command_line": by_hand.command_line})
        integrity.seal(folder)
        again = parse(words)
        assert (again.load, again.ckpt_step, again.no_resume) == (str(tmp_path), None, False)
        monkeypatch.delenv(RESTART)
        assert parse(words).load == wanted
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert parse(words).ckpt_step is None

    def test_a_schedule_that_is_kept_has_its_own_rates(self, parse: Parse, tmp_path: Path):
        words = f"{GMLP} --load {tmp_path} --use-checkpoint-opt_param-scheduler --lr"
        checkpoint(parse(GMLP), tmp_path)
        folder = iteration_folder(tmp_path, 3)
        write_records(folder, model_flags(parse(GMLP)), {"flags": {"lr": 1e-3, "min_lr": 0.0}})
        integrity.seal(folder)
        message = (
            r"--lr 0\.002 beside --use-checkpoint-opt_param-scheduler, .* give --lr 0\.001, or"
        )
        refusal(parse, f"{words} 2e-3", message)
        assert parse(f"{words} 1e-3")

    def test_an_iteration_of_nothing(self, parse: Parse, tmp_path: Path):
        message = "--ckpt-step 5 asks for a checkpoint, and there is no --load"
        refusal(parse, f"{GMLP} --ckpt-step 5", message)
        refusal(parse, f"{GMLP} --ckpt-step 5 --save {tmp_path}", f"{tmp_path} holds no checkpoint")


def checkpoint(args: Any, folder: Path) -> None:
    """Write what a save leaves for the check: the tracker file and the flags of the model."""
    iteration_folder(folder, 3).mkdir()
    write_records(iteration_folder(folder, 3), model_flags(args), {})
    (folder / TRACKER).write_text("3")


class TestPricedGates:
    WORDS = f"{GMLP} --token-router base --num-experts 2"

    @pytest.mark.parametrize(
        ("others", "message"),
        [
            ("--base-prices none", "--base-gate price needs the prices of a training"),
            ("--base-eval greedy", "--base-eval greedy: --base-gate price evaluates by prices"),
            ("--base-eval-both", "--base-eval-both: --base-gate price evaluates by prices only"),
        ],
    )
    def test_priced_gates_go_by_prices(self, parse: Parse, others: str, message: str):
        refusal(parse, f"{self.WORDS} --base-gate price {others}", message)
        assert parse(f"{self.WORDS} --base-gate price --base-eval prices")


class TestSettled:
    """Defaults that depend on other flags."""

    def test_positions(self, parse: Parse):
        """Rows of the spatial matrix are positions; attention needs an embedding of them."""
        assert parse(GMLP).position_embedding_type == "none"
        assert parse(TRANSFORMER).position_embedding_type == "learned_absolute"
        given = "learned_absolute"
        assert parse(f"{GMLP} --position-embedding-type {given}").position_embedding_type == given
        assert parse(TRANSFORMER).max_position_embeddings == 16

    @pytest.mark.parametrize(
        ("router", "experts_per_token", "loss", "coefficient"),
        [
            ("switch", 1, "aux_loss", 0.01),
            ("gshard", 2, "aux_loss", 0.01),
            ("base", 1, "none", 0.0),
            ("hash", 1, "none", 0.0),
        ],
    )
    def test_the_rule_of_the_router_settles_megatrons_flags(
        self, parse: Parse, router: str, experts_per_token: int, loss: str, coefficient: float
    ):
        args = parse(f"{TRANSFORMER} --token-router {router} --num-experts 4")
        assert args.moe_router_topk == experts_per_token
        assert args.moe_router_load_balancing_type == loss
        assert args.moe_aux_loss_coeff == coefficient

    def test_a_coefficient_of_the_balance_loss_is_kept(self, parse: Parse):
        words = f"{TRANSFORMER} --token-router switch --num-experts 4 --moe-aux-loss-coeff 0.02"
        assert parse(words).moe_aux_loss_coeff == 0.02
        words = f"{TRANSFORMER} --token-router base --num-experts 4 --moe-aux-loss-coeff 0"
        assert parse(words).moe_aux_loss_coeff == 0

    def test_spatial_gating_needs_no_attention_heads_in_any_layout(self, parse: Parse, processes):
        from megatron_smlp.model import transformer_config

        processes(2)
        config = transformer_config(parse(f"{GMLP} --tensor-model-parallel-size 2"))
        assert config.tensor_model_parallel_size == 2

    def test_experts_under_tensor_parallelism_are_sequence_parallel(self, parse: Parse, processes):
        processes(2)
        words = f"{SMLP} --token-router switch --num-experts 2 --tensor-model-parallel-size 2"
        assert parse(words).sequence_parallel

    @pytest.mark.skipif(not cpu.needed(), reason="there is a CUDA device")
    def test_what_the_platform_sets(self, parse: Parse):
        args = parse(f"{GMLP} --distributed-backend nccl")
        assert {name: getattr(args, name) for name in cpu.FLAGS} == cpu.FLAGS
        assert args.distributed_backend == "gloo"


def test_a_wrong_flag_on_the_real_command_line():
    """One line on standard error, exit code 2, no traceback, nothing else."""
    flags = [*MINIMAL.split(), *GMLP.split(), "--spatial-heads", "3"]
    done = subprocess.run(
        [sys.executable, "pretrain_smlp.py", *flags],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(
        "pretrain_smlp.py: error: --spatial-heads 3 does not divide the gate"
    )
