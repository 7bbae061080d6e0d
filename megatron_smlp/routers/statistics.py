"""Statistics of the routers, counted on their device and read occasionally.

    f_e        share of the choices that ask for expert e, before any is dropped
    entropy    - sum_e f_e log f_e / log E         1 where even, 0 where one expert gets everything
    drop rate  share of the choices that found no slot
    mean gate  mean weight of the first choices (token router), mean of s_i (feature router)
    closed     share of the first choices whose weight is under 0.01, if the rule can give such
    aux loss   the rule's balance loss, without its coefficient: 1 where uniform
    z loss     mean over tokens of (log sum_e exp score_e)^2, without its coefficient

A choice is a token's (one of its k), or that of a (sample, chunk) pair. A forward pass that is
repeated to recompute activations is counted once. Every rank sums what only it knows; `take` sums
over ranks, so the numbers do not depend on the layout.

Letters: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from megatron_smlp.routers.handed import repeats_a_pass

RouterKind = Literal["token", "feature"]
FIELDS = ("kept", "gate", "gates", "closed", "aux_loss", "z_loss", "groups")


class RouterKey(NamedTuple):
    """Names a router: a layer may have one of each kind."""

    layer: int
    """Layer number in the whole model, from 1."""
    kind: RouterKind


class RouterSpec(NamedTuple):
    """Facts about a router that every rank must know, wherever the router lives."""

    key: RouterKey
    num_experts: int
    can_close: bool
    has_aux_loss: bool
    has_z_loss: bool


@dataclass(frozen=True)
class RouterLoad:
    """Load of one router since the last report. The formulas are at the top of the file."""

    load_share: tuple[float, ...]
    """f_e of each expert; their sum is 1."""
    drop_rate: float
    mean_gate: float
    closed_rate: float | None
    aux_loss: float | None
    z_loss: float | None
    choices: float
    """Number of choices that these statistics cover."""

    @property
    def load_share_min(self) -> float:
        return min(self.load_share)

    @property
    def load_share_max(self) -> float:
        return max(self.load_share)

    @property
    def entropy(self) -> float:
        if len(self.load_share) == 1:
            return 1.0
        nats = sum(share * math.log(1 / share) for share in self.load_share if share > 0)
        return nats / math.log(len(self.load_share))


class RouterCounter:
    """The sums of one router on one rank.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.num_experts = num_experts
        # fp64 counts exactly. Row 0 is for evaluation, row 1 for training.
        size = (2, num_experts + len(FIELDS))
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        self.on_host = torch.zeros(2, len(FIELDS), dtype=torch.float64)
        """Sums of numbers that the host knows: on a device, each would be a kernel."""

    def add(
        self, *, training: bool, experts: Tensor, asked: Tensor, **values: Tensor | float
    ) -> None:
        """Add one forward pass.

        experts: <int64>[M], the choices; asked: <bool>[M], which of them are sent at all; values:
        what FIELDS names: sums over choices, and over routing groups (`aux_loss`, `groups`).
        """
        row, on_host = self.sums[int(training)], self.on_host[int(training)]
        row[: self.num_experts].index_add_(0, experts, asked.to(row.dtype))
        for name, value in values.items():
            place = FIELDS.index(name)
            if isinstance(value, Tensor):
                row[self.num_experts + place].add_(value)
            else:
                on_host[place] += value

    def pop(self, *, training: bool) -> Tensor:
        """Return the sums since the last call: <fp64>[E + FIELDS] on the device."""
        row, on_host = self.sums[int(training)], self.on_host[int(training)]
        sums = row.clone()
        sums[self.num_experts :] += on_host.to(sums.device)
        row.zero_()
        on_host.zero_()
        return sums


class CountedRouter:
    """Mixin for routers that can be counted; `RouterStatistics.attach` starts the counting."""

    router_kind: ClassVar[RouterKind]
    can_close: ClassVar[bool] = False
    """Whether a choice's weight may get near 0, which the largest of E shares cannot."""
    has_aux_loss: ClassVar[bool] = False
    num_experts: int
    layer_number: int | None
    counter: RouterCounter | None = None

    @property
    def counts(self) -> bool:
        """Return whether this forward pass is to be counted."""
        return self.counter is not None and not repeats_a_pass()

    @property
    def has_z_loss(self) -> bool:
        return False

    def spec(self) -> RouterSpec:
        assert self.layer_number is not None
        key = RouterKey(self.layer_number, self.router_kind)
        return RouterSpec(key, self.num_experts, self.can_close, self.has_aux_loss, self.has_z_loss)


class RouterStatistics:
    """The counters of all routers of a model, over all ranks."""

    def __init__(self) -> None:
        self.specs: list[RouterSpec] = []
        self.counters: dict[RouterKey, RouterCounter] = {}

    def attach(self, model: Sequence[nn.Module]) -> None:
        """Start to count in these model chunks. Collective: every rank learns of every router."""
        device = torch.device(torch.cuda.current_device())
        routers = [m for chunk in model for m in chunk.modules() if isinstance(m, CountedRouter)]
        for router in routers:
            router.counter = RouterCounter(router.num_experts, device)
            self.counters[router.spec().key] = router.counter
        everywhere: list[list[RouterSpec]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, [router.spec() for router in routers])
        self.specs = sorted({spec for specs in everywhere for spec in specs})

    def take(self, *, training: bool) -> dict[RouterKey, RouterLoad]:
        """Return what was counted since the last call, by router. Collective."""
        if not self.specs:
            return {}
        device = torch.device(torch.cuda.current_device())
        widths = [spec.num_experts + len(FIELDS) for spec in self.specs]
        total = torch.zeros(sum(widths), dtype=torch.float64, device=device)
        for spec, sums in zip(self.specs, total.split(widths), strict=True):
            if spec.key in self.counters:
                sums.copy_(self.counters[spec.key].pop(training=training))
        torch.distributed.all_reduce(total)
        rows = [part.tolist() for part in total.cpu().split(widths)]
        pairs = zip(self.specs, rows, strict=True)
        # A rule that may skip may have visited no expert at all.
        return {
            spec.key: _load(spec, values)
            for spec, values in pairs
            if any(values[: spec.num_experts])
        }


def _load(spec: RouterSpec, sums: list[float]) -> RouterLoad:
    """Make a report from the sums of all ranks: E counts, then FIELDS."""
    asked, values = (
        sums[: spec.num_experts],
        dict(zip(FIELDS, sums[spec.num_experts :], strict=True)),
    )
    choices = sum(asked)
    return RouterLoad(
        load_share=tuple(count / choices for count in asked),
        drop_rate=1 - values["kept"] / choices,
        mean_gate=values["gate"] / values["gates"],
        closed_rate=values["closed"] / values["gates"] if spec.can_close else None,
        aux_loss=values["aux_loss"] / values["groups"] if spec.has_aux_loss else None,
        z_loss=values["z_loss"] / values["gates"] if spec.has_z_loss else None,
        choices=choices,
    )
