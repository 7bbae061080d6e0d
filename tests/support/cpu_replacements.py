"""Every name that the CPU platform replaces, grouped by what runs there on a CUDA device."""

from megatron_smlp.platform.cpu import FACTORIES

_CUDA = """Event Stream current_device current_stream default_generators device_count
    get_device_capability get_device_properties get_rng_state is_current_stream_capturing
    manual_seed set_device set_rng_state set_stream stream synchronize"""

TORCHS = {
    *(f"torch.cuda.{name}" for name in _CUDA.split()),
    *(f"torch.cuda.random.{name}" for name in ("get_rng_state", "set_rng_state")),
    *(f"torch.{name}" for name in FACTORIES),
    *(f"torch.Tensor.{name}" for name in ("cuda", "to", "type")),
    *(f"torch.nn.Module.{name}" for name in ("cuda", "to")),
}
"""torch's own runs, and means the CUDA device."""

MEGATRONS = {
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
    "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
    "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
    "megatron.core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer.allgather_params",
}
"""Megatron's own function runs."""
