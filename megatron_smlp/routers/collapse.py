"""When a router is said to collapse: few experts do all the work, the others learn nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_smlp.routers.statistics import RouterKey, RouterLoad

COLLAPSED = 0.8
"""A router has collapsed where the entropy of its load is under this share of log E."""
CLOSED_GATE = 0.01
"""Under this weight a token gets next to nothing of its expert, and the expert no gradient."""
CLOSED = 0.5
"""A router has collapsed, too, where more than this share of its choices have no more weight."""


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
            if key.kind in self.fixed or key in self.warned or not (what := _signs(load)):
                continue
            self.warned.add(key)
            yield (
                f"warning: iteration {when}: the {key.kind} router of layer {key.layer} "
                f"collapses: {what} (docs/metrics.md)"
            )


def _signs(load: RouterLoad) -> str:
    """Return by what a router is seen to have collapsed; empty: it has not."""
    if load.entropy < COLLAPSED:
        busiest = load.load_share.index(load.load_share_max)
        return (
            f"entropy {load.entropy:.2f} of log E is under {COLLAPSED}, expert {busiest} gets "
            f"{load.load_share_max:.0%} of the choices"
        )
    if load.closed_rate is not None and load.closed_rate > CLOSED:
        return (
            f"{load.closed_rate:.0%} of the choices are weighed by less than {CLOSED_GATE}, "
            "so that their experts neither do nor learn anything"
        )
    return ""
