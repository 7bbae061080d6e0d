"""The base class of the token mixers, which fill Megatron's `self_attention` slot."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch.nn import functional


class MegatronTokenMixer(MegatronModule):
    """A module for Megatron's `self_attention` slot."""

    has_halves = False
    """Whether linear_fc1 is two projections side by side, [A | B], each sharded by itself."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None,
    ) -> None:
        super().__init__(config=config)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        # --swiglu and --quick-geglu are for FFNs; between two products a mixer keeps its GELU.
        is_gated = config.gated_linear_unit
        self.activation = functional.gelu if is_gated else config.activation_func

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe to Megatron which slice of each global tensor this rank holds.

        In modules that are not Megatron's, a parameter is sharded if it is marked so, as the
        gradient norm requires. In the checkpoint [A | B] is one tensor, A's rows first, for any
        tensor parallel size.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own: dict[str, Any] = {}
        for name, child in self.named_children():
            if not hasattr(child, "sharded_state_dict"):
                own |= child.state_dict(prefix=f"{name}.", keep_vars=True)
        axes = {
            name: it.partition_dim
            for name, it in own.items()
            if getattr(it, "tensor_model_parallel", False)
        }
        dp_cp_group = metadata["dp_cp_group"]
        sharded |= make_sharded_tensors_for_checkpoint(
            own, prefix, axes, sharded_offsets, tp_group=self.tp_group, dp_cp_group=dp_cp_group
        )
        keys = (f"{prefix}linear_fc1.{name}" for name in ("weight", "bias"))
        for key in (key for key in keys if self.has_halves and key in sharded):
            sharded[key] = apply_swiglu_sharded_factory(
                sharded[key],
                sharded_offsets,
                metadata.get("singleton_local_shards", False),
                tp_group=self.tp_group,
                dp_group=dp_cp_group,
            )
        return sharded
