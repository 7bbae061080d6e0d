"""The Megatron functions that checkpoints/ calls or replaces have the expected shape."""

import inspect

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_smlp.megatron_patches.checkpoint_files import installed

OWNERS = (serialization, filesystem_async, FileSystemWriterAsync)


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
    """Megatron must look them up by the name that is replaced."""
    assert "save_config(" in inspect.getsource(serialization.save)
    assert "get_write_results_queue(" in inspect.getsource(FileSystemWriterAsync.prepare_write_data)
