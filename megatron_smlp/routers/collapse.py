"""When a router is said to collapse: few experts do all the work, the others learn nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_smlp.routers.statistics import RouterKey, RouterLoad

COLLAPSED = 0.8
"""A router has collapsed where the entropy of its load is under this share of log E."""


class CollapseWatch:
    """Says once of each router that it collapsed.

    Args:
        fixed: kinds of routers whose load they do not choose (HASH).
    """

    def __init__(self, *, fixed: Collection[str] = ()) -> None:
        self.fixed = fixed
        self.warned: set[RouterKey] = set()

    def warnings(
        self, loads: Mapping[RouterKey, RouterLoad], *, iteration: int, title: str = ""
    ) -> Iterator[str]:
        """Return a line for each router that collapsed since the last call.

        title: of an evaluation; empty in training.
        """
        when = f"{iteration} {title}".rstrip()
        for key, load in loads.items():
            if key.kind in self.fixed or key in self.warned or load.entropy >= COLLAPSED:
                continue
            self.warned.add(key)
            busiest = load.load_share.index(load.load_share_max)
            yield (
                f"warning: iteration {when}: the {key.kind} router of layer {key.layer} "
                f"collapses: entropy {load.entropy:.2f} of log E is under {COLLAPSED}, expert "
                f"{busiest} gets {load.load_share_max:.0%} of the choices (docs/metrics.md)"
            )
