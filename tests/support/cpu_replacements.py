"""Every name that the CPU platform replaces, by what runs in its place on a CUDA device."""

from megatron_smlp.platform.cpu import FACTORIES

_CUDA = """Event Stream current_device current_stream default_generators default_stream
    device_count empty_cache get_device_capability get_device_name get_device_properties
    get_rng_state is_current_stream_capturing manual_seed manual_seed_all
    max_memory_allocated max_memory_reserved memory_allocated memory_reserved memory_stats
    reset_peak_memory_stats set_device set_rng_state set_stream stream synchronize"""
_TENSOR = "cuda new_empty new_full new_ones new_tensor new_zeros to type"

TORCHS = {
    *(f"torch.cuda.{name}" for name in _CUDA.split()),
    *(f"torch.cuda.nvtx.{name}" for name in ("mark", "range", "range_pop", "range_push")),
    *(
        f"torch.cuda.random.{name}"
        for name in ("get_rng_state", "manual_seed", "manual_seed_all", "set_rng_state")
    ),
    *(f"torch.{name}" for name in FACTORIES),
    *(f"torch.Tensor.{name}" for name in _TENSOR.split()),
    *(f"torch.nn.Module.{name}" for name in ("cuda", "to")),
    "torch.distributed.distributed_c10d._create_gloo_process_group",
}
"""torch's own, which means the device there."""

MEGATRONS = {
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
    "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
    "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
}
"""Megatron's own function runs."""
