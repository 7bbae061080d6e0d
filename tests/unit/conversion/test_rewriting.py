"""Checkpoints that are rewritten for another layout resume as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import carry_on
from support.conversions import assert_same, folder_weights, run, weights
from support.in_process import pretrained
from support.launches import records
from support.smlp_systems import make_config

from megatron_smlp.checkpoints import integrity, state
from megatron_smlp.checkpoints.folders import iteration_folder
from megatron_smlp.checkpoints.run_record import read_run_record
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert
from megatron_smlp.conversion.huggingface import flags_of
from megatron_smlp.conversion.record import LAYOUT
from megatron_smlp.conversion.rewriting import ANY_LAYOUT, check_layout
from megatron_smlp.errors import UsageError

MODEL = "--architecture transformer --num-attention-heads 4 --log-interval 1"


def test_a_rewritten_checkpoint_goes_on_with_its_optimizer(tmp_path: Path):
    save = f"{MODEL} --save {tmp_path / 'run'} --save-interval 2 --lr-decay-style constant"
    with pretrained(f"{save} --log-dir {tmp_path / 'old'}"):
        old = [r["loss"] for r in records(tmp_path / "old") if "loss" in r]
    said = run(convert.torch_dist_to_torch_dist, tmp_path / "run", tmp_path / "new", ckpt_step=2)
    assert "iteration 2" in said[-1]
    before = TorchDistCheckpoint(tmp_path / "run", iteration=2)
    after = TorchDistCheckpoint(tmp_path / "new")
    assert_same(
        {name: before.read(name) for name in before.all_specs},
        {name: after.read(name) for name in after.all_specs},
    )
    assert integrity.verify(after.folder) == []
    load = f"--load {tmp_path / 'new'} --log-dir {tmp_path / 'log'} --lr-decay-style constant"
    with pretrained(f"{MODEL} {load}"):
        new = [r["loss"] for r in records(tmp_path / "log") if "loss" in r]
    assert new == pytest.approx(old[2:], rel=1e-6)
    carry_on(f"--load {tmp_path / 'new'} --use-checkpoint-args --exit-interval 3")
    record = read_run_record(iteration_folder(tmp_path / "new", 3)) or {}
    assert record["flags"]["num_attention_heads"] == 4
    weights = tmp_path / "weights"
    drops = {"drop_optimizer": True, "checks": False}
    run(convert.torch_dist_to_torch_dist, tmp_path / "run", weights, **drops)
    assert not any("optimizer" in name for name in TorchDistCheckpoint(weights).all_specs)
    assert TorchDistCheckpoint(weights).args.tokenizer_type == "NullTokenizer"
    best = tmp_path / "best"  # its content says which iteration it is
    best.symlink_to(before.folder)
    said = run(convert.torch_dist_to_torch_dist, best, tmp_path / "renamed", checks=False)
    assert said[-1].endswith("iteration 2")
    assert TorchDistCheckpoint(tmp_path / "renamed").all_specs == before.all_specs


def test_optimizer_state_of_one_layout_resumes_and_is_not_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Expert parallel sizes are part of the layout too."""
    flags = f"{MODEL} --use-distributed-optimizer --optimizer-checkpoint data_parallel"
    flags += f" --lr-decay-style constant --save {tmp_path / 'run'} --save-interval 2"
    with pretrained(f"{flags} --log-dir {tmp_path / 'old'}"):
        old = [r["loss"] for r in records(tmp_path / "old") if "loss" in r]
    checkpoint = TorchDistCheckpoint(tmp_path / "run", iteration=2)
    moments = [n for n in checkpoint.all_specs if n.startswith("optimizer.")]
    assert moments
    assert not any(name.startswith(ANY_LAYOUT) for name in moments)
    with pretrained(f"{flags} --ckpt-step 2 --log-dir {tmp_path / 'log'}"):
        new = [r["loss"] for r in records(tmp_path / "log") if "loss" in r]
    assert new == pytest.approx(old[2:], rel=1e-6)
    plain = f"{MODEL} --lr-decay-style constant --load {tmp_path / 'run'}"
    said = pytest.raises(UsageError, match=r"dp_reshardable, which only .*--no-load-optim")
    with said, pretrained(plain):
        pass
    common = state.dist_checkpointing.load_common_state_dict

    def of_two_ranks(folder: str) -> Any:
        found = common(folder)
        found["args"].expert_model_parallel_size = 2
        return found

    monkeypatch.setattr(state.dist_checkpointing, "load_common_state_dict", of_two_ranks)
    with said, pretrained(f"{flags} --ckpt-step 2"):
        pass
    monkeypatch.undo()
    for layout in (None, dict(zip(LAYOUT, (2, 1, 1), strict=True))):
        changes = {"layout": layout} if layout else {}
        message = r"saved with --optimizer-checkpoint data_parallel \(optimizer.*--drop-optimizer"
        with pytest.raises(UsageError, match=message):
            run(convert.torch_dist_to_torch_dist, tmp_path / "run", tmp_path / "new", **changes)
    drops = {"drop_optimizer": True, "checks": False}
    run(convert.torch_dist_to_torch_dist, tmp_path / "run", tmp_path / "new", **drops)
    assert not any("optimizer" in name for name in TorchDistCheckpoint(tmp_path / "new").all_specs)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((3, 1, 1), "num-attention-heads"),
        ((1, 3, 1), "num-layers 4"),
        ((4, 1, 1), "--make-vocab-size-divisible-by"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: tuple[int, ...], message: str):
    flags = flags_of(
        make_config("transformer", num_layers=4, vocab_size=126, tiny_attention_width=64)
    )
    with pytest.raises(UsageError, match=message):
        check_layout(flags, dict(zip(LAYOUT, layout, strict=True)))


def test_a_model_with_mup_fits_a_layout():
    flags = flags_of(make_config("transformer", num_layers=4))
    flags |= {"use_mup": True, "mup_base_hidden_size": 16}
    check_layout(flags, {"pipeline_model_parallel_size": 2})


def test_the_mean_of_the_last_checkpoints(tmp_path: Path):
    """Exported, and as a release, from which training starts and which evaluation reads."""
    saved, mean, exported = (tmp_path / name for name in ("run", "mean", "exported"))
    with pretrained(f"{MODEL} --lr 1e-2 --save {saved} --save-interval 1"):
        pass
    said = run(convert.torch_dist_to_torch_dist, saved, mean, average=3)
    assert said[-1].endswith("a release (iteration 0)")
    kept = [weights(TorchDistCheckpoint(saved, iteration=number)) for number in (2, 3, 4)]
    expected = {name: sum(one[name] for one in kept) / 3 for name in kept[0]}
    found = weights(TorchDistCheckpoint(mean))
    torch.testing.assert_close(found, expected)
    assert all((found[name] - kept[-1][name]).abs().max() > 1e-5 for name in found if "fc1" in name)
    run(convert.torch_dist_to_hf, saved, exported, average=3, checks=False)
    there = folder_weights(exported)["model.embed_tokens.weight"]
    assert torch.equal(there, found["embedding.word_embeddings.weight"])
    assert "the mean of 3 checkpoints" in (exported / "README.md").read_text(encoding="utf-8")
    with pretrained(f"{MODEL} --load {mean} --skip-train --log-dir {tmp_path / 'log'}"):
        assert [r for r in records(tmp_path / "log") if "validation_loss" in r]
    for count in (1, 5):
        with pytest.raises(UsageError, match=f"--average {count}: .* holds 4 checkpoints"):
            run(convert.torch_dist_to_hf, saved, tmp_path / "more", average=count)
    # Sizes differ if the vocabulary's padding does, which may change within a run.
    more = "--save-interval 1 --train-iters 5 --padded-vocab-size 104"
    with pretrained(f"{MODEL} --save {saved} {more}"):
        pass
    with pytest.raises(UsageError, match=r"--average 2: .*iter_0000004 has tensors of different"):
        run(convert.torch_dist_to_hf, saved, tmp_path / "more", average=2)
