"""Megatron's functions that checkpoints/ calls, and those that are replaced, have their shape."""

import inspect
from collections.abc import Callable
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing

from megatron_smlp.megatron_patches.checkpoint_files import installed

OWNERS = (serialization, filesystem_async, FileSystemWriterAsync)


def names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_everything_is_put_back():
    before = [dict(vars(owner)) for owner in OWNERS]
    with installed(lambda error: None):
        now = [dict(vars(owner)) for owner in OWNERS]
    changed = {
        name
        for old, new in zip(before, now, strict=True)
        for name in old
        if old[name] is not new[name]
    }
    assert changed == {
        "write_preloaded_data", "finish", "save_config", "get_write_results_queue"
    }  # fmt: skip
    assert [dict(vars(owner)) for owner in OWNERS] == before


def test_signatures():
    """Of what checkpoints/state.py, saving.py and the replacements call."""
    assert {"async_sharded_save", "content_metadata", "async_strategy", "verify_integrity"} <= {
        *names(dist_checkpointing.save)
    }
    assert names(dist_checkpointing.save)[:3] == [
        "sharded_state_dict", "checkpoint_dir", "sharded_strategy"
    ]  # fmt: skip
    assert names(dist_checkpointing.load)[:3] == names(dist_checkpointing.save)[:3]
    assert names(checkpointing.generate_state_dict)[:5] == [
        "args", "model", "optimizer", "opt_param_scheduler", "rng_state"
    ]  # fmt: skip
    assert names(checkpointing.get_rng_state)[:3] == ["ckpt_format", "tp_group", "pp_group"]
    assert names(checkpointing._build_sharded_state_dict_metadata) == ["args", "dp_cp_group"]
    assert {"write_bucket", "results_queue"} <= set(
        names(FileSystemWriterAsync.write_preloaded_data)
    )
    fields = async_utils.AsyncRequest._fields
    assert fields[:3] == ("async_fn", "async_fn_args", "finalize_fns")
    assert names(async_utils.AsyncCallsQueue.maybe_finalize_async_calls)[1:] == [
        "blocking", "no_dist"
    ]  # fmt: skip


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
    """By the name that is replaced."""
    assert "save_config(" in inspect.getsource(serialization.save)
    assert "get_write_results_queue(" in inspect.getsource(FileSystemWriterAsync.prepare_write_data)
