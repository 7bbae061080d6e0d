"""The modules that Megatron extends. Each rejects what Transformer Engine's own rejects."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ..record import record

PARALLEL_MODES = (None, "column", "row")


class _Module(nn.Module):
    """Checks its arguments, and records them under the name of its class in this file."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        name = next(c.__name__ for c in type(self).__mro__ if c.__module__ == __name__)
        record(name, given)
        self.given = given

    def get_extra_state(self) -> Tensor:
        """Return an empty state, where Transformer Engine saves each module's FP8 state."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


class _Parallel(_Module):
    """Sizes of this rank, and parameters drawn as Transformer Engine draws them."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        group = given.get("tp_group")
        self.tp_size = group.size() if group is not None else given.get("tp_size", 1)
        self.parallel_mode = given.get("parallel_mode")
        assert self.parallel_mode in PARALLEL_MODES, f"parallel_mode {self.parallel_mode}"
        self.in_features, self.out_features = given["in_features"], given["out_features"]
        if self.parallel_mode == "column":
            self.out_features = self._share(self.out_features)
        elif self.parallel_mode == "row":
            self.in_features = self._share(self.in_features)
        self.sequence_parallel = self.tp_size > 1 and given.get("sequence_parallel", False)
        self.use_bias = given.get("bias", True)
        self.save_original_input = given.get("save_original_input", False)

    def _share(self, features: int) -> int:
        assert features % self.tp_size == 0, f"{features} features over {self.tp_size} ranks"
        return features // self.tp_size

    def _make(self, number: str = "") -> None:
        kind = {"dtype": self.given.get("params_dtype"), "device": self.given.get("device", "cuda")}
        weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **kind))
        tracker = self.given.get("get_rng_state_tracker")
        name = self.given.get("rng_tracker_name")
        names = (name,) if name else ()
        with tracker().fork(*names) if tracker else contextlib.nullcontext(), torch.no_grad():
            self.given["init_method"](weight)
        setattr(self, f"weight{number}", weight)
        bias = torch.zeros(self.out_features, **kind) if self.use_bias else torch.empty(0, **kind)
        setattr(self, f"bias{number}", nn.Parameter(bias) if self.use_bias else bias)


class Linear(_Parallel):
    """y = x A^T + b."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._make()


class LayerNormLinear(Linear):
    """A norm and a linear layer in one."""


class GroupedLinear(_Parallel):
    """The linear layers of some experts."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.num_gemms = given["num_gemms"]
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        if given.get("ub_overlap_rs") or given.get("ub_overlap_ag"):
            raise ValueError("GroupedLinear has no overlap of communication")
        if self.tp_size > 1 and self.use_bias:
            raise ValueError("GroupedLinear has no bias under tensor parallelism")
        for number in range(self.num_gemms):
            self._make(str(number))


class _Norm(_Module):
    """Transformer Engine's norms are operations, which have no place for an FP8 state."""

    with_bias: bool

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        kind = {"dtype": given.get("params_dtype"), "device": given.get("device", "cuda")}
        self.weight = nn.Parameter(torch.ones(given["normalized_shape"], **kind))
        if self.with_bias:
            self.bias = nn.Parameter(torch.zeros(given["normalized_shape"], **kind))
        if given.get("sequence_parallel") is not None:
            for parameter in self.parameters():
                parameter.sequence_parallel = given["sequence_parallel"]


class LayerNorm(_Norm):
    """With weight and bias."""

    with_bias = True


class RMSNorm(_Norm):
    """With a weight."""

    with_bias = False


class DotProductAttention(_Module):
    """Attention without parameters."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        heads, groups = given["num_attention_heads"], given.get("num_gqa_groups")
        assert heads % (groups or heads) == 0, f"{heads} heads, {groups} groups"


class Fp8Padding(_Module):
    """Pads the tokens of each expert."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__(num_gemms=num_gemms, align_size=align_size)


class Fp8Unpadding(Fp8Padding):
    """Removes the padding."""
