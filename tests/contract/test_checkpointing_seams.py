"""Megatron's functions that megatron_patches/checkpointing.py replaces still have their shape."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing, training
from support.in_process import prepare_megatron

from megatron_smlp.checkpoints.folders import TRACKER
from megatron_smlp.checkpoints.writer import weights_state
from megatron_smlp.megatron_patches.checkpointing import installed

OWNERS = (dist_checkpointing, checkpointing, serialization, filesystem_async, training)
NOTHING = {"before_loading": lambda: None, "before_writing": lambda: None}


def names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_everything_is_put_back():
    before = [dict(vars(owner)) for owner in (*OWNERS, FileSystemWriterAsync)]
    with installed(SimpleNamespace(), **NOTHING):
        now = [dict(vars(owner)) for owner in (*OWNERS, FileSystemWriterAsync)]
    changed = {
        name
        for old, new in zip(before, now, strict=True)
        for name in old
        if old[name] is not new[name]
    }
    assert changed == {
        "save", "ensure_directory_exists", "maybe_msc", "read_metadata", "write_preloaded_data",
        "finish", "save_config", "get_write_results_queue", "save_checkpoint",
        "maybe_finalize_async_save", "setup_model_and_optimizer",
    }  # fmt: skip
    assert [dict(vars(owner)) for owner in (*OWNERS, FileSystemWriterAsync)] == before


def test_signatures():
    assert names(dist_checkpointing.save)[:2] == ["sharded_state_dict", "checkpoint_dir"]
    assert "async_sharded_save" in names(dist_checkpointing.save)
    assert names(training.save_checkpoint)[:3] == ["iteration", "model", "optimizer"]
    assert names(checkpointing.ensure_directory_exists) == ["filename", "check_parent"]
    assert names(checkpointing.read_metadata) == ["tracker_filename"]
    assert {"write_bucket", "results_queue"} <= set(
        names(FileSystemWriterAsync.write_preloaded_data)
    )
    fields = async_utils.AsyncRequest._fields
    assert fields[:3] == ("async_fn", "async_fn_args", "finalize_fns")


def test_torch_writes_to_the_stream_of_the_transforms_and_leaves_the_file_open():
    from torch.distributed.checkpoint import filesystem

    stream = "transforms.transform_save_stream(\n        write_item, stream\n    )"
    assert f"(transform_to, transform_descriptors) = {stream}" in inspect.getsource(
        filesystem._write_item
    )
    assert "*transform_list, stream, " in inspect.getsource(
        FileSystemWriterAsync.write_preloaded_data
    )
    assert not filesystem._StorageWriterTransforms().extensions, "which ours would leave out"


def test_where_the_functions_are_called():
    """By the name that is replaced, in the order that is relied on."""
    save = inspect.getsource(checkpointing.save_checkpoint)
    made = save.index("ensure_directory_exists(checkpoint_name, check_parent=False)")
    written = save.index("dist_checkpointing.save(")
    tracked = save.index("maybe_msc.open(tracker_filename, 'w')")
    assert made < written < tracked
    assert "save_checkpoint(" in inspect.getsource(training.save_checkpoint_and_time)
    assert "maybe_finalize_async_save(" in inspect.getsource(training.train)
    assert "load_checkpoint(" in inspect.getsource(training.setup_model_and_optimizer)
    assert "save_config(" in inspect.getsource(serialization.save)
    assert "get_write_results_queue(" in inspect.getsource(FileSystemWriterAsync.prepare_write_data)


def test_flags_of_the_model_alone_are_compared(monkeypatch: pytest.MonkeyPatch):
    """Weights alone know nothing of a tokenizer; a run may pad by another divisor."""
    prepare_megatron()
    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    sizes["max_position_embeddings"] = 16
    saved = weights_state(sizes, {}, {})["args"]
    now = {**vars(saved), "tokenizer_type": "GPT2BPETokenizer", "vocab_file": "vocab.json"}
    now |= {"make_vocab_size_divisible_by": 64, "data_parallel_random_init": True}
    now |= {"phase_transition_iterations": None, "use_dist_ckpt": True}
    monkeypatch.setattr(checkpointing, "get_args", lambda: SimpleNamespace(**now))
    monkeypatch.setattr(checkpointing, "get_checkpoint_version", lambda: 3.0)
    checkpointing.check_checkpoint_args(saved)
    saved.make_vocab_size_divisible_by, saved.tokenizer_type = 128, "HuggingFaceTokenizer"
    checkpointing.check_checkpoint_args(saved)
    saved.hidden_size = 16
    with pytest.raises(AssertionError, match="hidden_size value from checkpoint"):
        checkpointing.check_checkpoint_args(saved)


class TestTracker:
    @pytest.fixture(autouse=True)
    def replaced(self):
        with installed(SimpleNamespace(), **NOTHING):
            yield

    def test_it_is_replaced_at_once(self, tmp_path: Path):
        tracker = tmp_path / TRACKER
        tracker.write_text("2")
        with checkpointing.maybe_msc.open(str(tracker), "w") as file:
            file.write("4")
            assert tracker.read_text() == "2"
        assert tracker.read_text() == "4"
        assert [path.name for path in tmp_path.iterdir()] == [TRACKER]
        with checkpointing.maybe_msc.open(str(tracker), "r") as file:
            assert file.read() == "4"

    @pytest.mark.parametrize("text", ["", "garbage", "-3"])
    def test_one_that_says_nothing_does_not_end_the_process(self, tmp_path: Path, text: str):
        tracker = tmp_path / TRACKER
        tracker.write_text(text)
        assert checkpointing.read_metadata(str(tracker)) == (-1, False)

    def test_what_it_says_is_read_by_megatron(self, tmp_path: Path):
        tracker = tmp_path / TRACKER
        tracker.write_text("12")
        assert checkpointing.read_metadata(str(tracker)) == (12, False)
        tracker.write_text("release")
        assert checkpointing.read_metadata(str(tracker)) == (0, True)
