"""Command line and YAML -> checked arguments, and a readable one-line error for each mistake."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import TRACKER, iteration_folder
from megatron_smlp.checkpoints.model_record import model_flags
from megatron_smlp.checkpoints.run_record import write_records
from megatron_smlp.errors import UsageError
from megatron_smlp.platform import cpu
from megatron_smlp.restart_note import RESTART

Parse = Callable[..., Any]

GMLP = "--architecture gmlp"
SMLP = (
    "--architecture smlp --num-dense-layers 2 --feature-router deterministic "
    "--num-feature-experts 4"
)
PARTIAL = SMLP.replace("deterministic", "partial")
TRANSFORMER = "--architecture transformer --num-attention-heads 4"
BOTH_SCHEDULES = "--use-checkpoint-opt_param-scheduler --override-opt_param-scheduler"
PRICED = "--token-router base --num-experts 2 --base-gate price"
GROUPED = f"{TRANSFORMER} --group-query-attention"
ROPE = f"{TRANSFORMER} --position-embedding-type rope"
TP = "--tensor-model-parallel-size"


def refusal(parse: Parse, flags: str, message: str) -> None:
    """Check that `flags` are refused in one line that matches `message`."""
    with pytest.raises(UsageError) as caught:
        parse(flags)
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(message, text), text


SWITCH, TOPK = (
    f"{TRANSFORMER} --token-router {rule} --num-experts 4" for rule in ("switch", "topk")
)
BASE, HASH = (f"{TRANSFORMER} --token-router {rule} --num-experts 4" for rule in ("base", "hash"))
# Whole flags that a system does not take are in test_what_works.py.
REFUSED = f"""
    --spatial_heads is not a flag: did you mean --spatial-heads | {GMLP} --spatial_heads=4
    unknown argument 'stray' | {GMLP} stray
    --num-layers 0 | {GMLP} --num-layers 0
    .*--moe-layer-freq: .*never closed | {SWITCH} --moe-layer-freq [0,1
    .*-backend: .* 'f' .choose from flash, | {GMLP} --wandb-project f --attention-backend=f

    --spatial-heads 3 .*--ffn-hidden-size 64 | {GMLP} --spatial-heads 3
    --spatial-heads 1 .*gate width 15.5 | {GMLP} --ffn-hidden-size 31
    --spatial-heads 5 .*--hidden-size 32 | --architecture mixer --spatial-heads 5
    --num-feature-experts 5 | {SMLP} --num-feature-experts 5
    --num-feature-experts 1 | {SMLP} --num-feature-experts 1
    --num-dense-layers 5 | {SMLP} --num-dense-layers 5
    --num-dense-layers 2 is for --architecture smlp, not gmlp | {GMLP} --num-dense-layers 2
    --feature-router deterministic is for | {TRANSFORMER} --feature-router deterministic
    --num-attention-heads 5 | --num-attention-heads 5

    --num-experts 4 .*without --token-router | {TRANSFORMER} --num-experts 4
    --token-router base | {TRANSFORMER} --token-router base
    --num-experts 1 | {TRANSFORMER} --token-router gshard --num-experts 1
    --moe-train-capacity-factor 0 | {SWITCH} --moe-train-capacity-factor 0
    --moe-train-capacity-factor 1.0 is for .*switch or gshard | {BASE} --moe-train-capacity-factor 1
    --moe-aux-loss-coeff 0.1 is for .*switch, gshard or topk, | {HASH} --moe-aux-loss-coeff 0.1
    --moe-aux-loss-coeff 0.1 0.2 | {SWITCH} --moe-aux-loss-coeff 0.1 0.2
    --moe-aux-loss-coeff 0.1 | {TOPK} --moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1
    --moe-router-topk 2 | {SWITCH} --moe-router-topk 2
    --moe-router-topk 0 | {TOPK} --moe-router-topk 0
    .*--num-experts 4 is too few | {TOPK} --moe-router-topk 5
    .*sinkhorn does not work here | {TOPK} --moe-router-load-balancing-type sinkhorn
    .*give softmax or sigmoid | {TOPK} --moe-router-score-function sqrtsoftplus
    --moe-router-enable-expert-bias | {TOPK} --moe-router-enable-expert-bias
    --moe-router-bias-update-rate | {TOPK} --moe-router-bias-update-rate 0.1
    --moe-token-drop-policy probs | {BASE} --moe-token-drop-policy probs

    --prefix-fraction 0 | {PARTIAL} --prefix-fraction 0
    --prefix-fraction 0.01 | {PARTIAL} --prefix-fraction 0.01
    --num-feature-chunks 3 | {PARTIAL} --num-feature-chunks 3
    --prefix-fraction 0.5 is for --feature-router partial, | {SMLP} --prefix-fraction 0.5
    --num-feature-chunks 8 | {SMLP} --num-feature-chunks 8
    --tiny-attention-width 32 is for --architecture amlp, | {GMLP} --tiny-attention-width 32
    --tiny-attention-width 0 | --architecture amlp --tiny-attention-width 0

    --base-eval greedy | {GMLP} {PRICED} --base-eval greedy
    --eval-tasks copa needs a training | {GMLP} --skip-train --eval-tasks copa
    --attention-dropout 0.3 needs attention | {GMLP} --attention-dropout 0.3
    --attention-softmax-in-fp32 needs attention | {GMLP} --attention-softmax-in-fp32
    --num-query-groups 3 does not divide | {GROUPED} --num-query-groups 3
    --position-embedding-type rope turns pairs | {ROPE} --kv-channels 3
    --glu-linear-offset 1.0 needs --swiglu | {TRANSFORMER} --glu-linear-offset 1
    --dist-ckpt-workers 3 needs --async-save | {GMLP} --dist-ckpt-workers 3
    --lr-warmup-init 0.5 exceeds --lr | {GMLP} --lr-warmup-init 0.5
    --keep-every 3 .*--save-interval 2 | {GMLP} --save-interval 2 --keep-last 1 --keep-every 3
    --use-checkpoint-opt_param.*--override | {GMLP} {BOTH_SCHEDULES}
    Megatron refuses these .*lr-warm | {GMLP} --lr-warmup-iters 1 --lr-warmup-fraction 0.5
    Megatron refuses these .*expected iteration-based | {GMLP} --train-samples 10
"""
LAYOUTS = f"""
    --tensor-model-parallel-size 4 .*--spatial-heads 2 | {GMLP} --spatial-heads 2 {TP} 4
    --tensor-model-parallel-size 4 .*-experts 2 | {SMLP} --num-feature-experts 2 {TP} 4
    --tensor-model-parallel-size 8 .*-heads 4 | {TRANSFORMER} {TP} 8
    --tensor-model-parallel-size 2 .*-chunks 1 | {PARTIAL} --num-feature-chunks 1 {TP} 2
    --tensor-model-parallel-size 4 .*gate width 30 | {GMLP} --ffn-hidden-size 60 {TP} 4
    --tensor-model-parallel-size 4 .*-hidden-size 66 | {TRANSFORMER} --ffn-hidden-size 66 {TP} 4
    --context-parallel-size 2 .*attention only | {TRANSFORMER} --context-parallel-size 2
    --full-validation | {GMLP} {TP} 2 --full-validation --multiple-validation-sets
    --padded-vocab-size 102 | {GMLP} --padded-vocab-size 102 {TP} 4 --global-batch-size 4
    --padded-vocab-size 90 | {GMLP} --padded-vocab-size 90 --global-batch-size 16
    --optimizer muon .*-groups 2 .*{TP} 4 | {GROUPED} --num-query-groups 2 {TP} 4 --optimizer muon
    --num-experts 3 | {SMLP} --token-router switch --num-experts 3 --expert-model-parallel-size 2
"""


def rows(text: str) -> list[list[str]]:
    """Split `refusal | flags` lines."""
    return [line.strip().split(" | ") for line in text.splitlines() if line.strip()]


class TestRefusals:
    """Errors have flag, value, what is allowed, what to do, as in tests/golden/refusals.txt."""

    @pytest.mark.parametrize(("message", "flags"), rows(REFUSED))
    def test_what_cannot_be(self, parse: Parse, message: str, flags: str):
        refusal(parse, flags, f"^{message}")

    @pytest.mark.parametrize(("message", "flags"), rows(LAYOUTS))
    def test_layouts(self, parse: Parse, monkeypatch: pytest.MonkeyPatch, message: str, flags: str):
        monkeypatch.setenv("WORLD_SIZE", "8")
        refusal(parse, flags, f"^{message}")

    def test_a_hash_table_of_another_router(self, parse: Parse):
        flags = f"{TRANSFORMER} --token-router base --num-experts 4 --hash-table balanced"
        refusal(parse, flags, r"--hash-table .* is for --token-router hash, not base: leave it out")

    @pytest.mark.skipif(not cpu.needed(), reason="there is a CUDA device, which has these")
    @pytest.mark.parametrize(
        "flag",
        ["--fp16", "--tp-comm-overlap", "--log-memory-to-tensorboard", "--record-memory-history"],
    )
    def test_what_only_a_gpu_has(self, parse: Parse, flag: str):
        refusal(parse, f"{GMLP} {flag}", rf"{flag} needs a CUDA device and none was found\. Leave")

    @pytest.mark.parametrize(
        "flag", ["--spatial-heads 2", "--architecture transformer --num-attention-heads 32"]
    )
    def test_another_model_than_the_checkpoints(self, parse: Parse, tmp_path: Path, flag: str):
        checkpoint(parse(GMLP), tmp_path)
        flags = f"{GMLP} --load {tmp_path} {flag}"
        refusal(parse, flags, f"^{flag.split(' --')[0]} contradicts the checkpoint {tmp_path}")

    @pytest.mark.parametrize(
        ("flag", "remedy"),
        [
            ("--disable-bias-linear", "--disable-bias-linear"),
            ("--norm-epsilon 1e-6", "--norm-epsilon 1e-06"),
        ],
    )
    def test_how_the_checkpoints_model_is_asked_for(
        self, parse: Parse, tmp_path: Path, flag: str, remedy: str
    ):
        checkpoint(parse(f"{TRANSFORMER} {flag}"), tmp_path)
        refusal(parse, f"{TRANSFORMER} --load {tmp_path}", f": give {remedy}, or give another")

    def test_a_load_without_a_checkpoint_is_no_start_from_scratch(self, parse: Parse, tmp_path):
        """After a typo, Megatron would train from random weights."""
        checkpoint(parse(GMLP), tmp_path)
        none = tmp_path / "none"
        refusal(parse, f"{GMLP} --load {none}", rf"--load {none} is not a folder: give the --save")
        none.mkdir()
        flags = f"{GMLP} --load {none} --save {tmp_path}/new"
        refusal(parse, flags, "none holds no checkpoint: give")
        one = iteration_folder(tmp_path, 3)
        message = rf"--load {one} is a single checkpoint.*give --load {tmp_path} --ckpt-step 3\."
        refusal(parse, f"{GMLP} --load {one}", message)

    def test_launchers_give_one_folder_to_load_and_to_save(self, parse: Parse, tmp_path: Path):
        assert parse(f"{GMLP} --load {tmp_path}/run --save {tmp_path}/run").load is None
        (tmp_path / "run").mkdir()
        checkpoint(parse(GMLP), tmp_path / "run")
        flags = f"{GMLP} --load {tmp_path}/run --save {tmp_path}/run/"
        assert parse(flags).load == f"{tmp_path}/run"
        assert parse(f"{flags} --no-resume").load is None
        assert parse(f"{flags} --no-resume --finetune").load == f"{tmp_path}/run"
        message = "--ckpt-step 3 needs a checkpoint, but --no-resume ignores"
        refusal(parse, f"{flags} --no-resume --ckpt-step 3", message)

    def test_started_again_it_goes_on_from_its_own_checkpoint(self, parse: Parse, tmp_path: Path):
        """A queue reruns a command that first started from another run's weights."""
        theirs, ours = tmp_path / "theirs", tmp_path / "ours"
        for folder in (theirs, ours):
            folder.mkdir()
        flags = f"{GMLP} --load {theirs} --ckpt-step 3 --finetune --no-load-optim --save {ours}"
        checkpoint(parse(GMLP), theirs)
        first = parse(flags)
        assert (first.load, first.ckpt_step, first.finetune) == (str(theirs), 3, True)
        checkpoint(parse(GMLP), ours)
        again = parse(flags)
        assert (again.load, again.ckpt_step, again.finetune) == (str(ours), None, False)
        assert not again.no_load_optim
        assert parse(f"{flags} --no-resume").load == str(theirs)

    @pytest.mark.parametrize("how", ["--no-resume", "--load {} --ckpt-step 2"])
    def test_a_restart_does_not_go_back(
        self, parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ):
        """Once this command has saved something, a restart ignores what it says of its start."""
        flags = f"{GMLP} --save {tmp_path} {how.format(tmp_path)}"
        checkpoint(parse(GMLP), tmp_path)
        by_hand = parse(flags)
        wanted = None if how == "--no-resume" else str(tmp_path)
        assert (by_hand.load, by_hand.ckpt_step) == (wanted, 2 if "step" in how else None)
        monkeypatch.setenv(RESTART, '{"cause": "x", "noticed": 0}')
        assert parse(flags).load == wanted  # another command wrote that checkpoint
        checkpoint(by_hand, tmp_path, command_line=by_hand.command_line)
        again = parse(flags)
        assert (again.load, again.ckpt_step, again.no_resume) == (str(tmp_path), None, False)
        paths = [word.replace("/", "/of/another/machine/") for word in by_hand.command_line]
        checkpoint(by_hand, tmp_path, command_line=paths)
        assert parse(flags).ckpt_step is None
        monkeypatch.delenv(RESTART)
        assert parse(flags).load == wanted
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert parse(flags).ckpt_step is None

    def test_a_restart_whose_first_checkpoint_is_gone(
        self, parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """--keep-last has deleted it; the flags are those of the newest one."""
        argv = f"--use-checkpoint-args --load {tmp_path} --ckpt-step 2"
        model = parse(GMLP)
        checkpoint(model, tmp_path, command_line=[*GMLP.split(), "--weight-decay", "0.03"])
        line = parse(argv).command_line
        monkeypatch.setenv(RESTART, '{"cause": "x", "noticed": 0}')
        checkpoint(model, tmp_path, command_line=line)
        again = parse(argv)
        assert (again.weight_decay, again.ckpt_step) == (0.03, None)

    def test_a_schedule_that_is_kept_has_its_own_rates(self, parse: Parse, tmp_path: Path):
        flags = f"{GMLP} --load {tmp_path} --use-checkpoint-opt_param-scheduler --lr"
        checkpoint(parse(GMLP), tmp_path, flags={"lr": 1e-3, "min_lr": 1e-5})
        refusal(parse, f"{flags} 2e-3", r"--lr 0\.002 with .* give --lr 0\.001, or")
        refusal(parse, f"{flags} 1e-3", r"--min-lr 0\.0 with .* give --min-lr 1e-05, or")
        assert parse(f"{flags} 1e-3 --min-lr 1e-5")

    @pytest.mark.parametrize(
        ("flags", "goes_on"), [("--load {0}", True), ("--load {0} --save {0}/other", False)]
    )
    def test_a_run_goes_on_with_its_own_logs(
        self, parse: Parse, tmp_path: Path, flags: str, goes_on: bool
    ):
        logs, curves = tmp_path / "log", tmp_path / "curves"
        line = [*GMLP.split(), "--log-dir", str(logs), "--tensorboard-dir", str(curves)]
        checkpoint(parse(GMLP), tmp_path, command_line=line)
        args = parse(f"--use-checkpoint-args {flags.format(tmp_path)}")
        assert (args.log_dir == str(logs)) is goes_on
        assert (args.tensorboard_dir == str(curves)) is goes_on
        args = parse(f"--use-checkpoint-args {flags.format(tmp_path)} --no-tensorboard-dir")
        assert args.tensorboard_dir is None

    def test_a_record_does_not_say_whom_to_trust(self, parse: Parse, tmp_path: Path):
        line = [*GMLP.split(), "--trust-remote-code"]
        checkpoint(parse(GMLP), tmp_path, command_line=line)
        flags = f"--use-checkpoint-args --load {tmp_path}"
        assert not parse(flags).trust_remote_code
        assert parse(f"{flags} --trust-remote-code").trust_remote_code

    def test_an_iteration_of_nothing(self, parse: Parse, tmp_path: Path):
        message = "--ckpt-step 5 needs a checkpoint, but --load is missing"
        refusal(parse, f"{GMLP} --ckpt-step 5", message)
        refusal(parse, f"{GMLP} --ckpt-step 5 --save {tmp_path}", f"{tmp_path} holds no checkpoint")


def checkpoint(args: Any, folder: Path, **record: Any) -> None:
    """Write what the check reads from a save: the tracker file, the model's flags, the record."""
    saved = iteration_folder(folder, 3)
    saved.mkdir(exist_ok=True)
    write_records(saved, model_flags(args), record)
    integrity.seal(saved)
    (folder / TRACKER).write_text("3")


class TestSettled:
    """Defaults that depend on other flags."""

    @pytest.mark.parametrize(
        ("flags", "settled"),
        [
            (f"{SWITCH} --moe-aux-loss-coeff 0.02", (1, "aux_loss", 0.02)),
            (f"{BASE} --moe-aux-loss-coeff 0", (1, "none", 0.0)),
        ],
    )
    def test_the_rule_of_the_router_settles_megatrons_flags(
        self, parse: Parse, flags: str, settled: tuple[int, str, float]
    ):
        names = ("moe_router_topk", "moe_router_load_balancing_type", "moe_aux_loss_coeff")
        assert tuple(getattr(parse(flags), name) for name in names) == settled

    def test_a_loss_beside_a_bias_is_asked_for(self, parse: Parse):
        biased = f"{TOPK} --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
        refusal(parse, f"{biased} --moe-aux-loss-coeff 0.1", "--moe-aux-loss-coeff .* needs")
        assert parse(biased).moe_aux_loss_coeff == 0
        kind = "--moe-router-load-balancing-type aux_loss"
        args = parse(f"{biased} {kind} --moe-aux-loss-coeff 0.1")
        assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == ("aux_loss", 0.1)

    @pytest.mark.skipif(not cpu.needed(), reason="there is a CUDA device")
    @pytest.mark.parametrize(
        "flags",
        [
            f"{GMLP} --distributed-backend nccl",
            f"{TRANSFORMER} --position-embedding-type rope --transformer-impl transformer_engine",
        ],
    )
    def test_what_the_platform_sets(self, parse: Parse, flags: str):
        args = parse(flags)
        assert {name: getattr(args, name) for name in cpu.FLAGS} == cpu.FLAGS
        assert args.distributed_backend == "gloo"

    def test_a_folder_of_tasks_is_named_from_everywhere(
        self, parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.chdir(tmp_path)
        Path("tasks").mkdir()
        args = parse(f"{GMLP} --eval-tasks copa --eval-tasks-data-dir tasks")
        assert args.eval_tasks_data_dir == str(Path("tasks").absolute())
